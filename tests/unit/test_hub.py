"""One line where the hub refuses: why, and what to do; never a token, never a traceback."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from vlm_bridge import credentials
from vlm_bridge.configuration import LanguageModelConfig, VisionEncoderConfig
from vlm_bridge.credentials import hub_problem, reach_hub
from vlm_bridge.data_pipeline.sources.groundcap import GroundCap
from vlm_bridge.errors import CheckpointError, DataError, ModelError
from vlm_bridge.model_architecture.vision_encoder import build_vision_encoder
from vlm_bridge.model_architecture.weights import build_language_model
from vlm_bridge.training_strategy.checkpoint import find_checkpoint

GEMMA = "google/gemma-2-2b"


def refusal(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    """Return an error as the hub's client raises it, with a token in the request."""
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("Authorization: Bearer hf_secret", response=response)


def wrapped(error: Exception) -> Exception:
    """Return an error as transformers raises it because of another."""
    outer = OSError("something\nlong")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refusal(errors.GatedRepoError, 401), [f"accept its terms on {credentials.SITE}/{GEMMA}"]),
        (refusal(errors.GatedRepoError, 403), ["set HF_TOKEN", "export HF_TOKEN=", "tokens"]),
        (refusal(errors.HfHubHTTPError, 401), ["refused access", "(401)", "wrong or expired"]),
        (refusal(errors.HfHubHTTPError, 403), ["refused access", "(403)", "export HF_TOKEN="]),
        (refusal(errors.RepositoryNotFoundError, 401), ["no public model", "HF_TOKEN"]),
        (refusal(errors.RevisionNotFoundError, 404), ["no such revision"]),
        (errors.OfflineModeIsEnabled("offline"), ["cannot be reached", "unset HF_HUB_OFFLINE"]),
        (errors.LocalEntryNotFoundError("not cached"), ["cannot be reached", "save_pretrained"]),
        (ConnectionResetError("reset"), ["cannot be reached"]),
    ],
)
def test_every_refusal_gives_a_reason_and_a_remedy(error: Exception, words: list[str]) -> None:
    for raised in (error, wrapped(error)):
        line = hub_problem(raised, GEMMA)
        assert line is not None and "\n" not in line and "hf_secret" not in line
        assert all(word in line for word in words), line


def test_errors_of_other_origin_and_of_folders_are_left_alone(tmp_path: Path) -> None:
    for error in (wrapped(ValueError("odd")), refusal(errors.HfHubHTTPError, 500)):
        assert hub_problem(error, GEMMA) is None
    assert hub_problem(errors.LocalEntryNotFoundError("not cached"), str(tmp_path)) is None


def test_groundcap_names_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = Mock(side_effect=refusal(errors.HfHubHTTPError, 401))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataError) as caught:
        GroundCap().items()
    line = str(caught.value)
    assert line.startswith("cannot get daniel3303/GroundCap from the Hugging Face hub: ")
    assert line.endswith("or name a folder of its parquet files with --source-path")
    assert "/datasets/daniel3303/GroundCap (401)" in line and "save_pretrained" not in line


@pytest.mark.parametrize(
    ("is_offline", "problem"),
    [
        (False, r"127\.0\.0\.1:1 cannot be reached: check the network"),
        (True, "cannot be reached: unset HF_HUB_OFFLINE, or give a folder"),
    ],
)
def test_a_hub_that_does_not_answer_is_not_waited_for(
    is_offline: bool, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelError, match=f"load the language model.*{problem}"):
        build_language_model(LanguageModelConfig(name="owner/model"))
    with pytest.raises(CheckpointError, match=r"no checkpoint at owner/model, .*be reached"):
        find_checkpoint("owner/model")
    with pytest.raises(ModelError, match=f"load the vision encoder 'owner/model'.*{problem}"):
        build_vision_encoder(VisionEncoderConfig(name="owner/model + efficientnet-lite0"))


def test_local_files_ask_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked the hub"))
    reach_hub(str(tmp_path))
    reach_hub("no/name/of a repository")
    found = str(tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: found)
    reach_hub("owner/cached")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reach_hub("owner/model")


def test_names_of_checkpoints_ask_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").touch()
    download = Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint("me/captioner", "v1") == tmp_path / "model.safetensors"
    assert download.call_args.args == ("me/captioner",)
    assert download.call_args.kwargs["revision"] == "v1"
    with pytest.raises(CheckpointError, match="revision='v1' is for models on the hub"):
        find_checkpoint(tmp_path, "v1")


def test_paths_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("nowhere", "runs/mine", "mine/run", "a/b/c", "../x", "me/latest_checkpoint.pth"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            find_checkpoint(name)
