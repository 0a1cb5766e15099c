"""Fine-tune a combined file on a dataset, and write a combined file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from vlm_bridge.configuration import BridgeOptions, Recipe
from vlm_bridge.data_pipeline.caption_folder import is_caption_folder
from vlm_bridge.data_pipeline.sources import make_source
from vlm_bridge.data_pipeline.transform import Progress, transform
from vlm_bridge.device import resolve_device
from vlm_bridge.errors import DataError, UsageError
from vlm_bridge.formats import pvt_blip
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.model_architecture.pvt_cbam import image_processor, projection_for
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.resume import AUTO
from vlm_bridge.training_strategy.trainer import TrainingResult, train

logger = logging.getLogger(__name__)


class Dataset(NamedTuple):
    """A dataset's source, shipped recipe, folder of its download, and most images per split."""

    source: str
    recipe: str
    folder: str | None = None
    limit: int | None = None


DATASETS = {
    "flickr30k": Dataset("flickr30k", "blip-pvt-flickr30k", "datasets/flickr30k"),
    "coco": Dataset("coco", "blip-pvt-coco", "datasets/coco"),
    "coco_sample": Dataset("coco", "blip-pvt-coco-small", "datasets/coco", 1000),
    "coco_small": Dataset("coco", "blip-pvt-coco-small", "datasets/coco", 1000),
    "conceptual": Dataset("conceptual", "blip-pvt-conceptual", "datasets/conceptual/shards"),
    "local": Dataset("local", "blip-pvt-flickr30k"),
}


@dataclass(frozen=True)
class FineTuning:
    """A combined file to fine-tune, a dataset, and a combined file to write.

    Attributes:
        dataset_path: in its own layout, or a caption folder; None is where `vlm-data download`
            leaves it.
        output: the combined file to write; the run's folder has its name without the ending.
        pvt: model with the encoder's configuration; None takes the tensors'.
        blip: model with the decoder's configuration and tokenizer; None is the recipe's decoder.
    """

    checkpoint: Path
    dataset: str
    dataset_path: Path | None
    output: Path
    dataset_size: int | None = None
    pvt: str | None = None
    blip: str | None = None
    force: bool = False
    follow_links: bool = False

    @property
    def run_dir(self) -> Path:
        return self.output.with_suffix("").resolve()


def finetune_combined(
    settings: FineTuning,
    recipe: Recipe,
    show_progress: Callable[[str], AbstractContextManager[Progress]],
) -> TrainingResult:
    """Fine-tune a combined file and write one with the best weights; resume if interrupted.

    The caption folder and the run's folder are written beside the output.

    Args:
        recipe: its encoder, decoder, projection and folders give way to those of the settings.
        show_progress: name of the items -> a context with a function of (done, total).

    Raises:
        Interrupted: a signal came; the state was saved first.
    """
    if not settings.output.suffix:
        raise UsageError(f"the output is a file: {settings.output}.pth, for example")
    if settings.output.resolve() == settings.checkpoint.resolve():
        raise UsageError("the output is the checkpoint itself: choose another --output")
    resolve_device(recipe.device)
    recipe, bridge = _prepare(settings, recipe, _data(settings), show_progress)
    resume = AUTO if Path(recipe.checkpoint_dir).is_dir() else None
    result = train(recipe, resume=resume, initial_weights=bridge, force=settings.force)
    pvt_blip.write_combined(settings.output, combine_checkpoint(recipe.checkpoint_dir))
    return result


def _data(settings: FineTuning) -> Path:
    """Return the folder of the dataset."""
    dataset = DATASETS[settings.dataset]
    if settings.dataset_path is None and dataset.folder is None:
        raise UsageError(f"--dataset {settings.dataset} needs --dataset_path DIR")
    data = settings.dataset_path or Path(dataset.folder or "")
    if not data.is_dir():
        steps = f"; vlm-data download {dataset.source} prints how to get it"
        way_out = "" if settings.dataset_path else steps
        raise DataError(f"no such folder: {data} (--dataset_path){way_out}")
    return data


def _prepare(
    settings: FineTuning,
    recipe: Recipe,
    data: Path,
    show_progress: Callable[[str], AbstractContextManager[Progress]],
) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """Write the data and the frozen parts; return the run's recipe and the bridge's weights."""
    blip = settings.blip or recipe.language_model.name
    parts = pvt_blip.load_combined_model(settings.checkpoint, "cpu", blip, settings.pvt)
    projection = parts.proj
    if projection is None:
        config, width = parts.pvt.config, parts.blip.text_decoder.config.encoder_hidden_size
        sizes = f"{config.hidden_sizes[-1]} -> {width}"
        logger.info(f"no projection in the file: a new linear one, {sizes}, seed {recipe.seed}")
        torch.manual_seed(recipe.seed)
        projection = projection_for(config, "linear", width)
    weights = projection.state_dict()
    with show_progress("images") as progress:
        folder = _caption_folder(settings, data, recipe.num_workers, progress)
    logger.info(f"captions and images: {folder}")
    start = settings.run_dir / "start"
    _save_parts(start, settings, parts, blip, recipe.vision_encoder.resample or "bicubic")
    recipe = recipe.replace(
        vision_encoder=recipe.vision_encoder.replace(name=f"{start}/vision_encoder", revision=None),
        language_model=recipe.language_model.replace(name=f"{start}/language_model", revision=None),
        bridge=BridgeOptions(
            kind="projection",
            projection=pvt_blip.projection_kind(weights),
            standardize_features=False,
        ),
        data_dir=str(folder),
        checkpoint_dir=str(settings.run_dir / "checkpoints"),
        log_dir=str(settings.run_dir / "logs"),
    )
    return recipe, {f"bridge.projection.{name}": x for name, x in weights.items()}


def _caption_folder(settings: FineTuning, data: Path, workers: int, progress: Progress) -> Path:
    """Return the dataset as a caption folder: itself, or one made beside the output."""
    dataset = DATASETS[settings.dataset]
    if is_caption_folder(data):
        if settings.dataset_size is not None:
            raise UsageError(f"{data} is a caption folder already: --dataset_size has no use")
        return data.resolve()
    limit = settings.dataset_size or dataset.limit
    name = f"{settings.dataset}-{limit}-captions" if limit else f"{settings.dataset}-captions"
    folder = settings.output.resolve().parent / name
    source = make_source(dataset.source, input_dir=data, follow_links=settings.follow_links)
    transform(source, folder, workers=max(1, workers), limit=limit, progress=progress)
    return folder


def _save_parts(
    start: Path, settings: FineTuning, parts: pvt_blip.CombinedModel, blip: str, resample: str
) -> None:
    """Save the encoder and the decoder as folders that `from_pretrained` loads."""
    from transformers import AutoTokenizer

    with settings.checkpoint.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    identity = {"sha256": checksum, "pvt": settings.pvt, "blip": settings.blip}
    written_last = start / "combined.json"
    if written_last.is_file():
        if json.loads(written_last.read_bytes()) != identity:
            raise UsageError(
                f"{settings.run_dir} holds a training that started from another combined file or "
                "with other models: choose another --output, or delete that folder"
            )
        return
    for part in (parts.pvt, image_processor(resample=resample)):
        part.save_pretrained(start / "vision_encoder")
    for part in (parts.blip.text_decoder, AutoTokenizer.from_pretrained(blip)):
        part.save_pretrained(start / "language_model")
    written_last.write_text(json.dumps(identity) + "\n", encoding="utf-8")


def combine_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a trained captioner as a combined file has them.

    Args:
        path: a checkpoint, or the folder of a run, whose best one in full precision is taken.
    """
    folders = (Path(path), Path(path) / "checkpoints")
    whole = [f / name for f in folders for name in (checkpoints.BEST, checkpoints.LATEST)]
    where = checkpoints.checkpoint_path(next((file for file in whole if file.is_file()), path))
    content = checkpoints.load_checkpoint(where)
    recipe = checkpoints.recipe_of(content, where)
    checkpoints.check_sizes(content, recipe, where)
    captioner = build_captioner(recipe)
    checkpoints.load_weights(captioner, content["weights"], where)
    return pvt_blip.to_combined(captioner, where)
