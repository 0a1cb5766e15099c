"""Fixtures that every test may use. Tests need no network, no accelerator and no order.

Folders of tiny models and images are built once per run: tests read them and never write there.
"""

from __future__ import annotations

import os
import signal

# Before anything imports torch or transformers; commands started by tests inherit it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
# Bit-equality is a promise of one device; `CUDA_VISIBLE_DEVICES=0 make test` runs on a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vlm_bridge.configuration import Recipe

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, default=200, metavar="N", help="mutated inputs per reader (CI: 200)"
    )


def pytest_configure() -> None:
    """Let programs that tests start be interrupted: background jobs of a shell ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def drawn_caption_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A caption folder: 24 train, 8 val and 8 test images of 64 px with two captions each."""
    from drawn_captions import write_drawn_caption_folder

    return write_drawn_caption_folder(tmp_path_factory.mktemp("drawn"))


TINY_MODELS = (
    "llama", "gemma2", "gpt2", "blip", "bert", "cross_gpt2",  # hidden width 32
    "pvt_v2", "pvt", "pvt_cbam", "dinov2", "vit", "clip_vision", "clip", "siglip_vision",
)  # fmt: skip


def _tiny_model(name: str) -> Callable[[pytest.TempPathFactory], Path]:
    """Make the fixture `tiny_NAME_dir`: a tiny model with its tokenizer or processor."""

    @pytest.fixture(scope="session", name=f"tiny_{name}_dir")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        import tiny_models

        save = getattr(tiny_models, f"save_tiny_{name}")
        return save(tmp_path_factory.mktemp(f"tiny-{name.replace('_', '-')}"))

    return folder


globals().update({f"tiny_{name}_dir": _tiny_model(name) for name in TINY_MODELS})


@pytest.fixture
def make_recipe(
    tmp_path: Path, drawn_caption_folder: Path, tiny_vit_dir: Path, tiny_llama_dir: Path
) -> Callable[..., Recipe]:
    """Recipes of an epoch of six quick steps: ``make_recipe("name", "KEY=VALUE")``."""
    from captioners import places_of_run, tiny_recipe
    from vlm_bridge.configuration import override_recipe

    def make(name: str, *overrides: str, bridge: str = "prefix") -> Recipe:
        recipe = tiny_recipe(
            tiny_vit_dir, tiny_llama_dir, bridge,
            **places_of_run(tmp_path, name, drawn_caption_folder), learning_rate=1e-2, num_epochs=1,
            batch_size=8, captions_per_image=2, early_stopping_patience=None, log_every_n_steps=1,
            num_validation_samples=0, decode={"num_beams": 1, "max_new_tokens": 5},
        )  # fmt: skip
        return override_recipe(recipe, overrides)

    return make


RunCLI = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_cli(tmp_path: Path) -> RunCLI:
    """Run ``vlm-bridge ARGUMENTS`` in a process of its own, without a terminal, in a new folder."""

    def run(
        *arguments: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vlm_bridge", *map(str, arguments)],
            cwd=cwd or tmp_path, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    return run


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `run_cli`, but inside this process, without the seconds of its imports."""
    from vlm_bridge.cli.main import run_bridge

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["vlm-bridge", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_bridge()
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(
            command, exit_.value.code or 0, captured.out, captured.err
        )  # type: ignore[arg-type]

    return run
