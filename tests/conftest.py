"""Fixtures that every test may use. Tests need no network, no accelerator and no particular order.

Folders of tiny models and pictures are built once per run and shared: tests read them and never write there.
"""

from __future__ import annotations

import os
import signal

# Before anything imports torch, transformers or their friends; commands started by tests inherit it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
# Bit-equality is a promise of one device; `CUDA_VISIBLE_DEVICES=0 make test` runs on a GPU all the same.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, default=200, metavar="N", help="mutated inputs per reader (CI: 200)"
    )


def pytest_configure() -> None:
    """Let programs that tests start be interrupted: a shell's background jobs ignore Ctrl-C, and pass that on."""
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
    """A finished caption folder: 24 train, 8 val and 8 test pictures of 64 px with two captions each."""
    from drawn_captions import write_drawn_caption_folder

    return write_drawn_caption_folder(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LlamaForCausalLM and its tokenizer: hidden 32, rotary positions, grouped-query attention."""
    from tiny_models import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_gemma2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma2ForCausalLM and its tokenizer: hidden 32, scaled embeddings, softcaps, sliding window of 8."""
    from tiny_models import save_tiny_gemma2

    return save_tiny_gemma2(tmp_path_factory.mktemp("tiny-gemma2"))


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT2LMHeadModel and its tokenizer: hidden 32, learned absolute positions."""
    from tiny_models import save_tiny_gpt2

    return save_tiny_gpt2(tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def tiny_blip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BlipForConditionalGeneration and its tokenizer: hidden 32, cross-attention to states of width 24."""
    from tiny_models import save_tiny_blip

    return save_tiny_blip(tmp_path_factory.mktemp("tiny-blip"))


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BertLMHeadModel that cross-attends, and its tokenizer: hidden 32."""
    from tiny_models import save_tiny_bert

    return save_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_cross_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT2LMHeadModel with cross-attention, and its tokenizer: hidden 32."""
    from tiny_models import save_tiny_cross_gpt2

    return save_tiny_cross_gpt2(tmp_path_factory.mktemp("tiny-cross-gpt2"))


@pytest.fixture(scope="session")
def tiny_pvt_v2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PvtV2Model and its image processor: 64 px, a 2x2 grid, width 32."""
    from tiny_models import save_tiny_pvt_v2

    return save_tiny_pvt_v2(tmp_path_factory.mktemp("tiny-pvt-v2"))


@pytest.fixture(scope="session")
def tiny_pvt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PvtModel and its image processor: 64 px, a 2x2 grid and a class token, width 32."""
    from tiny_models import save_tiny_pvt

    return save_tiny_pvt(tmp_path_factory.mktemp("tiny-pvt"))


@pytest.fixture(scope="session")
def tiny_pvt_cbam_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PvtCbam and its image processor: 64 px, a 2x2 grid, width 64."""
    from tiny_models import save_tiny_pvt_cbam

    return save_tiny_pvt_cbam(tmp_path_factory.mktemp("tiny-pvt-cbam"))


@pytest.fixture(scope="session")
def tiny_dinov2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dinov2Model and its image processor: 56 px, class token and 4x4 patches, width 32."""
    from tiny_models import save_tiny_dinov2

    return save_tiny_dinov2(tmp_path_factory.mktemp("tiny-dinov2"))


@pytest.fixture(scope="session")
def tiny_vit_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViTModel and its image processor: 48 px, class token and 3x3 patches, width 32."""
    from tiny_models import save_tiny_vit

    return save_tiny_vit(tmp_path_factory.mktemp("tiny-vit"))


@pytest.fixture(scope="session")
def tiny_clip_vision_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIPVisionModel and its image processor: 32 px, class token and 4x4 patches, width 32."""
    from tiny_models import save_tiny_clip_vision

    return save_tiny_clip_vision(tmp_path_factory.mktemp("tiny-clip-vision"))


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIPModel (both towers) and its image processor: 32 px, class token and 4x4 patches, width 32."""
    from tiny_models import save_tiny_clip

    return save_tiny_clip(tmp_path_factory.mktemp("tiny-clip"))


@pytest.fixture(scope="session")
def tiny_siglip_vision_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SiglipVisionModel and its image processor: 32 px, 4x4 patches and no class token, width 32."""
    from tiny_models import save_tiny_siglip_vision

    return save_tiny_siglip_vision(tmp_path_factory.mktemp("tiny-siglip-vision"))


RunCLI = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_cli(tmp_path: Path) -> RunCLI:
    """Run ``vlm-bridge ARGUMENTS`` as a user would: a process of its own, no terminal, a fresh folder.

    ``run_cli("caption", path, cwd=..., env={...}, timeout=120)`` returns a ``CompletedProcess`` with text
    ``stdout`` and ``stderr``; nothing is raised for a failing command.
    """

    def run(
        *arguments: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vlm_bridge", *map(str, arguments)],
            cwd=cwd or tmp_path,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `run_cli`, but inside this process: exit code and output are the program's, without its seconds of imports."""
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
