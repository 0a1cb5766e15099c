"""Caption images by a small trained bridge between a frozen encoder and a frozen language model.

The names below are imported when they are first used: ``vlm-bridge --help`` never waits for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Captioner", "Recipe", "__version__", "evaluate", "finetune", "train", "transform"]

if TYPE_CHECKING:
    from vlm_bridge.captioning.pipeline import Captioner
    from vlm_bridge.configuration import Recipe
    from vlm_bridge.data_pipeline.transform import transform
    from vlm_bridge.evaluation.run import evaluate
    from vlm_bridge.finetuning import finetune
    from vlm_bridge.training_strategy.trainer import train

_MODULES = {
    "Captioner": "captioning.pipeline",
    "Recipe": "configuration",
    "evaluate": "evaluation.run",
    "finetune": "finetuning",
    "train": "training_strategy.trainer",
    "transform": "data_pipeline.transform",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
