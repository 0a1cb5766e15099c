"""Fine-tune a combined file on a dataset, and write a combined file."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm_bridge import runtime
from vlm_bridge.configuration import ProjectionOptions, Recipe, load_recipe, shipped_recipe
from vlm_bridge.data_pipeline.caption_folder import (
    MANIFEST_NAME,
    CaptionFolder,
    is_prepared_elsewhere,
)
from vlm_bridge.data_pipeline.sources import make_source
from vlm_bridge.data_pipeline.transform import Progress, transform
from vlm_bridge.errors import DataError, ModelError, UsageError
from vlm_bridge.formats.pvt_blip import (
    PREFIXES,
    CombinedModel,
    build_combined,
    from_combined,
    projection_for,
    projection_kind,
    read_combined,
    to_combined,
    write_combined,
)
from vlm_bridge.model_architecture.captioner import build_captioner
from vlm_bridge.model_architecture.pvt_blip import load_tokenizer, why
from vlm_bridge.model_architecture.pvt_cbam import image_processor
from vlm_bridge.training_strategy import checkpoint as checkpoints
from vlm_bridge.training_strategy.resume import AUTO
from vlm_bridge.training_strategy.trainer import TrainingResult, train

logger = logging.getLogger(__name__)

ShowProgress = Callable[[str], AbstractContextManager[Progress]]
"""Name of what is counted -> a context with a function of (done, total)."""


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
    """What to fine-tune, on what, and where to write it.

    Attributes:
        checkpoint: the combined file to start from.
        dataset: a name in `DATASETS`.
        dataset_path: the dataset in its own layout, or a caption folder; None is the folder of
            `vlm-data download`.
        output: the combined file to write; the run's folder has its name without the ending.
        overrides: `key=value` changes of the dataset's recipe.
        config: a recipe instead of the dataset's own.
        dataset_size: at most this many images per split.
        pvt: model with the encoder's configuration and preprocessing; None reads sizes from the
            tensors and normalizes as PVT does.
        blip: model with the decoder's configuration and tokenizer; None is the recipe's decoder.
        force: resume although the recipe or the data have changed.
        follow_links: read images through links that leave the dataset's folder.
    """

    checkpoint: Path
    dataset: str
    dataset_path: Path | None
    output: Path
    overrides: Sequence[str] = ()
    config: Path | None = None
    dataset_size: int | None = None
    pvt: str | None = None
    blip: str | None = None
    force: bool = False
    follow_links: bool = False

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise UsageError(f"unknown dataset {self.dataset!r}: choose from {', '.join(DATASETS)}")
        if self.dataset_size is not None and self.dataset_size < 1:
            raise UsageError(f"--dataset_size must be at least 1, not {self.dataset_size}")
        if not self.output.suffix:
            raise UsageError(f"the output is a file: {self.output}.pth, for example")
        if self.output.resolve() == self.checkpoint.resolve():
            raise UsageError(
                f"the output is the checkpoint itself: choose another file than {self.output}"
            )

    @property
    def data(self) -> Path:
        """The folder of the dataset; DataError without one."""
        dataset = DATASETS[self.dataset]
        if self.dataset_path is None and dataset.folder is None:
            raise UsageError(f"--dataset {self.dataset} needs --dataset_path DIR")
        path = self.dataset_path or Path(str(dataset.folder))
        if path.is_dir():
            return path
        if self.dataset_path is not None:
            raise DataError(f"no such folder: {path} (--dataset_path)")
        raise DataError(
            f"no dataset at {path}: run vlm-data download {dataset.source} here and follow its "
            "steps, or give --dataset_path DIR"
        )

    @property
    def run_dir(self) -> Path:
        return self.output.with_suffix("").resolve()

    def recipe(self) -> Recipe:
        path = self.config or shipped_recipe(DATASETS[self.dataset].recipe)
        return load_recipe(path, self.overrides)


def finetune_combined(
    settings: FineTuning,
    *,
    show_progress: ShowProgress = lambda what: nullcontext(lambda done, total: None),
) -> TrainingResult:
    """Fine-tune a combined file and write one with the best weights; resume if interrupted.

    The caption folder and the run's folder are written beside the output.

    Raises:
        VLMBridgeError: a file, the data or a model cannot be used, or another training is there.
        Interrupted: a signal came; the state was saved first.
    """
    recipe = settings.recipe()
    runtime.resolve_device(recipe.device)
    data = settings.data
    state = read_combined(settings.checkpoint)
    blip = settings.blip or recipe.language_model.name
    parts = build_combined(state, settings.checkpoint, pvt=settings.pvt, blip=blip)
    projection = parts.proj or _new_projection(parts, recipe.seed)
    state |= {f"{PREFIXES[2]}{name}": tensor for name, tensor in projection.state_dict().items()}
    with show_progress("images") as progress:
        folder = _caption_folder(settings, data, recipe, progress)
    logger.info(f"captions and images: {folder}")
    start = _lay_out(settings, recipe, parts)
    checkpoint_dir = settings.run_dir / "checkpoints"
    encoder, decoder = str(start / "vision_encoder"), str(start / "language_model")
    recipe = recipe.replace(
        vision_encoder=recipe.vision_encoder.replace(name=encoder, revision=None),
        language_model=recipe.language_model.replace(name=decoder, revision=None),
        bridge=_bridge(recipe, projection),
        data_dir=str(folder),
        checkpoint_dir=str(checkpoint_dir),
        log_dir=str(settings.run_dir / "logs"),
    )
    tensors = from_combined(state, settings.checkpoint)
    bridge = {name: tensor for name, tensor in tensors.items() if name.startswith("bridge.")}
    del state, parts, projection, tensors  # `train` loads the frozen parts from their folders
    resume = AUTO if checkpoint_dir.is_dir() else None
    result = train(recipe, resume=resume, initial_weights=bridge, force=settings.force)
    write_combined(settings.output, combine_checkpoint(checkpoint_dir))
    return result


def _new_projection(parts: CombinedModel, seed: int) -> nn.Module:
    """A linear projection with random weights between the encoder and the decoder."""
    config, width = parts.pvt.config, parts.blip.text_decoder.config.encoder_hidden_size
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        projection = projection_for(config, "linear", width)
    sizes = f"{config.hidden_sizes[-1]} -> {width}"
    logger.info(f"no projection in the file: a new linear one, {sizes}, with seed {seed}")
    return projection


def _caption_folder(settings: FineTuning, path: Path, recipe: Recipe, progress: Progress) -> Path:
    """Return the dataset as a caption folder: itself, or one made beside the output."""
    dataset = DATASETS[settings.dataset]
    if (path / MANIFEST_NAME).is_file() or is_prepared_elsewhere(path):
        if settings.dataset_size is not None:
            raise UsageError(
                f"{path} is a caption folder already: --dataset_size is for datasets in their own "
                "layout"
            )
        return CaptionFolder.open(path).root.resolve()
    limit = settings.dataset_size or dataset.limit
    name = f"{settings.dataset}-{limit}-captions" if limit else f"{settings.dataset}-captions"
    folder = settings.output.resolve().parent / name
    transform(
        make_source(dataset.source, input_dir=path, follow_links=settings.follow_links),
        folder,
        workers=max(1, recipe.num_workers),
        limit=limit,
        progress=progress,
    )
    return folder


def _lay_out(settings: FineTuning, recipe: Recipe, parts: CombinedModel) -> Path:
    """Save the encoder and the decoder as folders that `from_pretrained` loads."""
    start = settings.run_dir / "start"
    with settings.checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    identity = {"sha256": digest, "pvt": settings.pvt, "blip": settings.blip}
    if start.is_dir():
        if json.loads((start / "combined.json").read_bytes()) != identity:
            raise UsageError(
                f"{settings.run_dir} holds a training that started from another combined file or "
                "with other models: choose another --output, or delete that folder"
            )
        return start
    blip = settings.blip or recipe.language_model.name
    tokenizer = load_tokenizer(blip, remedy="--blip-model names another BLIP or folder")
    processor = _processor(settings.pvt, recipe.vision_encoder.resample or "bicubic")
    unfinished = start.with_name(".start")
    shutil.rmtree(unfinished, ignore_errors=True)
    for part in (parts.pvt, processor):
        part.save_pretrained(unfinished / "vision_encoder")
    for part in (parts.blip.text_decoder, tokenizer):
        part.save_pretrained(unfinished / "language_model")
    (unfinished / "combined.json").write_text(json.dumps(identity) + "\n", encoding="utf-8")
    unfinished.rename(start)
    return start


def _bridge(recipe: Recipe, projection: nn.Module) -> ProjectionOptions:
    """Return the recipe's bridge as a plain projection of the file's kind."""
    bridge = recipe.bridge
    bridge = bridge if isinstance(bridge, ProjectionOptions) else ProjectionOptions()
    kind = projection_kind(projection.state_dict())
    return bridge.replace(projection=kind, position_embeddings=False, standardize_features=False)


def _processor(name: str | None, resample: str) -> Any:
    from PIL import Image
    from transformers import AutoImageProcessor

    if name is None:
        return image_processor(resample=resample)
    try:
        return AutoImageProcessor.from_pretrained(
            name, backend="pil", resample=Image.Resampling[resample.upper()]
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load the image processor of {name!r}: {why(error, name)} (--pvt names another "
            "model or folder)"
        ) from error


def combine_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a trained captioner as a combined file has them.

    Args:
        path: a checkpoint, or the folder of a run, whose best one in full precision is taken.

    Raises:
        CheckpointError: no checkpoint, or one of a captioner that is no PVT + projection + BLIP.
        ModelError: a part cannot be loaded.
    """
    whole = [
        Path(path) / place / name
        for place in ("", "checkpoints")
        for name in (checkpoints.BEST, checkpoints.LATEST)
    ]
    where = checkpoints.checkpoint_path(next((file for file in whole if file.is_file()), path))
    content = checkpoints.load_checkpoint(where)
    captioner = build_captioner(checkpoints.recipe_of(content, where))
    checkpoints.restore(captioner, content, where)
    return to_combined(captioner, where)
