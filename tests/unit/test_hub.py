"""What the hub refuses is one line: why, and what to do; never a token, never a traceback."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from vlm_bridge import hub
from vlm_bridge.configuration import LanguageModelConfig, VisionEncoderConfig
from vlm_bridge.data_pipeline.sources.groundcap import GroundCap
from vlm_bridge.errors import CheckpointError, DataError, ModelError
from vlm_bridge.hub import hub_problem, reach_hub
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.model_architecture.weights import build_language_model
from vlm_bridge.training_strategy.checkpoint import find_checkpoint

GEMMA = "google/gemma-2-2b"


def refusal(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    """An error as the hub's client raises it, with a token in the request as there would be."""
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("Authorization: Bearer hf_secret", response=response)


def wrapped(error: Exception) -> Exception:
    """The error inside one of transformers' own."""
    try:
        try:
            raise error
        except Exception as cause:
            raise OSError("something\nlong") from cause
    except OSError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            refusal(errors.GatedRepoError, 401),
            ["accept its terms on https://huggingface.co/google/gemma-2-2b"],
        ),
        (
            refusal(errors.GatedRepoError, 403),
            ["set HF_TOKEN", "export HF_TOKEN=", "settings/tokens"],
        ),
        (refusal(errors.HfHubHTTPError, 401), ["refused access (401)", "export HF_TOKEN="]),
        (refusal(errors.HfHubHTTPError, 403), ["refused access (403)", "export HF_TOKEN="]),
        (refusal(errors.RepositoryNotFoundError, 401), ["no public model", "HF_TOKEN"]),
        (refusal(errors.RevisionNotFoundError, 404), ["no such revision"]),
        (errors.OfflineModeIsEnabled("offline"), ["cannot be reached", "unset HF_HUB_OFFLINE"]),
        (errors.LocalEntryNotFoundError("not cached"), ["cannot be reached", "save_pretrained"]),
        (ConnectionResetError("reset"), ["cannot be reached"]),
    ],
)
def test_every_refusal_says_why_and_what_to_do(error: Exception, said: list[str]) -> None:
    for raised in (error, wrapped(error)):
        line = hub_problem(raised, GEMMA)
        assert line is not None
        assert all(words in line for words in said), line
        assert "\n" not in line
        assert "hf_secret" not in line


@pytest.fixture
def stored_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token in huggingface_hub's own file, and none in the environment."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return "hf_stored"


def test_a_refused_token_is_named_by_its_place(
    stored_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = wrapped(refusal(errors.HfHubHTTPError, 401))
    line = hub_problem(error, GEMMA)
    assert line is not None
    assert "refused the token that `hf auth login` stored (401): it is wrong or has expired" in line
    assert stored_token not in line
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    line = hub_problem(error, GEMMA)
    assert line is not None
    assert "refused the token in HF_TOKEN (401)" in line
    assert "hf_mine" not in line
    line = hub_problem(refusal(errors.RepositoryNotFoundError, 401), GEMMA)
    assert line is not None
    assert line.endswith("(the token in HF_TOKEN may not, or has expired)")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (refusal(errors.HfHubHTTPError, 401), ["refused the token in HF_TOKEN (401)"]),
        (
            refusal(errors.GatedRepoError, 403),
            ["accept its terms on https://huggingface.co/datasets/"],
        ),
        (
            refusal(errors.HfHubHTTPError, 403),
            ["refused access (403)", "/datasets/daniel3303/GroundCap"],
        ),
        (errors.LocalEntryNotFoundError("not cached"), ["cannot be reached: "]),
    ],
)
def test_groundcap_says_what_the_hub_refused(
    error: Exception, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataError) as caught:
        GroundCap().items()
    line = str(caught.value)
    assert line.startswith("cannot get daniel3303/GroundCap from the Hugging Face hub: ")
    assert line.endswith("or name a folder of its parquet files with --source-path")
    assert all(words in line for words in said), line
    assert "check the network" not in line and "save_pretrained" not in line


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """As if the network were allowed; returns whom a probe asked, and none answers."""
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(
        hub, "_connect", lambda host, port: asked.append((host, port)) or time.sleep(2)
    )
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    return asked


def test_a_hub_that_does_not_answer_is_asked_once_and_not_for_long(
    online: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    with pytest.raises(
        ModelError, match=r"load the language model.*cannot be reached: check the network"
    ):
        build_language_model(LanguageModelConfig(name="owner/model"))
    with pytest.raises(CheckpointError, match="cannot be reached: check the network"):
        find_checkpoint("owner/model")
    with pytest.raises(
        ModelError, match=r"load the vision encoder 'owner/model'.*cannot be reached"
    ):
        build_vision_encoder(VisionEncoderConfig(name="owner/model + efficientnet-lite0"))
    assert time.monotonic() - started < 1.5
    assert online == [("huggingface.co", 443)] * 3
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://mirror.example:8080")
    with pytest.raises(ModelError, match=r"http://mirror.example:8080 cannot be reached"):
        build_language_model(LanguageModelConfig(name="owner/model"))
    monkeypatch.setenv("http_proxy", "proxy.example:3128")
    with pytest.raises(ConnectionError, match=r"proxy\.example"):
        reach_hub("owner/model")
    assert online[3:] == [("mirror.example", 8080), ("proxy.example", 3128)]


def test_nobody_is_asked_for_what_is_here(
    online: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach_hub(str(tmp_path))
    reach_hub("no/name/of a repository")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json"
    )
    reach_hub("owner/cached")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    reach_hub("owner/model")
    assert online == []


def test_a_hub_that_answers_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://{host}:{port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        reach_hub("owner/model")
    reach_hub("owner/model")
    hub._REACHED.clear()
    with pytest.raises(ConnectionError):
        reach_hub("owner/model")


def test_errors_of_other_origin_and_of_folders_are_left_alone(tmp_path: Path) -> None:
    assert hub_problem(wrapped(ValueError("odd configuration")), GEMMA) is None
    assert hub_problem(refusal(errors.HfHubHTTPError, 500), GEMMA) is None
    assert hub_problem(errors.LocalEntryNotFoundError("not cached"), str(tmp_path)) is None


def test_gemma_without_access_names_the_page_and_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: Any, **__: Any) -> None:
        raise refusal(errors.GatedRepoError, 401)

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", gated)
    with pytest.raises(ModelError) as caught:
        build_language_model(LanguageModelConfig(name=GEMMA))
    line = str(caught.value)
    assert line.startswith(f"cannot load the language model '{GEMMA}': access is gated")
    assert f"https://huggingface.co/{GEMMA}" in line
    assert "export HF_TOKEN=" in line
    assert "\n" not in line


def test_gemma_offline_has_a_line_of_its_own() -> None:
    with pytest.raises(
        ModelError, match=r"cannot be reached: unset HF_HUB_OFFLINE, or give a folder"
    ):
        build_language_model(LanguageModelConfig(name=GEMMA))


def test_a_vision_encoder_offline_has_the_same_line() -> None:
    with pytest.raises(
        ModelError, match=r"cannot load the vision encoder 'facebook/dinov2-large': .*reached"
    ):
        build_vision_encoder(VisionEncoderConfig(name="facebook/dinov2-large"))


class TestCheckpointsOnTheHub:
    def test_a_name_that_is_no_path_is_looked_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        (tmp_path / "model.safetensors").touch()

        def download(name: str, **options: Any) -> str:
            asked.append((name, options["revision"]))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert find_checkpoint("me/captioner", "v1") == tmp_path / "model.safetensors"
        assert asked == [("me/captioner", "v1")]

    @pytest.mark.parametrize(
        "name", ["nowhere", "runs/mine", "mine/run", "a/b/c", "../x", "me/latest_checkpoint.pth"]
    )
    def test_paths_are_not(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
        )
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine").mkdir()
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            find_checkpoint(name)

    def test_what_is_not_there_is_one_line(self) -> None:
        with pytest.raises(
            CheckpointError,
            match=r"no checkpoint at me/captioner, and none from the hub: .*reached",
        ):
            find_checkpoint("me/captioner")

    def test_a_revision_of_a_path_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="revision='v1' is for models on the hub"):
            find_checkpoint(tmp_path, "v1")
