"""Caption images by a small trained bridge between a frozen encoder and a frozen language model.

``from vlm_bridge import Captioner`` loads a trained captioner; everything else is a command (see
the README). Imports are lazy so that ``vlm-bridge --help`` never waits for torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Captioner", "__version__"]

if TYPE_CHECKING:
    from vlm_bridge.captioning.pipeline import Captioner


def __getattr__(name: str):
    if name == "Captioner":
        from vlm_bridge.captioning.pipeline import Captioner

        return Captioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
