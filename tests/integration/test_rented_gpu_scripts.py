"""The scripts for rented machines; ssh, the GPU and our own commands are stubs."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CONTROL = REPOSITORY / "scripts" / "control_vastai_local.sh"
SETUP = REPOSITORY / "scripts" / "setup_vastai_remote.sh"
DOWNLOADS = {
    "download-best": "best_model.pth",
    "download-latest": "latest_checkpoint.pth",
    "download-weights": "best_model_weights_only.pth",
}
TOKEN = "hf_" + "x9" * 17
Result = subprocess.CompletedProcess[str]
# Runs the command here, in the home folder of the machine.
SSH = """
while [[ $1 == -* ]]; do case $1 in -[opil]) shift 2 ;; *) shift ;; esac; done
shift; cd {home} && HOME={home} exec bash -c "$*"
"""
# Each stub notes its call and its environment.
STUB = """
printf '%s\\n' "${0##*/} $*" >>"$STUB_NOTES/calls"
env >>"$STUB_NOTES/environments"
"""
STUBS = {
    "python": "",
    "tensorboard": 'while [ ! -e "$STUB_NOTES/stop" ]; do sleep 0.1; done',
    "vlm-data": 'for last; do :; done; mkdir -p "$last"; touch "$last/manifest.json"',
    "vlm-training": """
[ ! -e "$STUB_NOTES/fail" ] || { echo 'error: Gemma is gated' >&2; exit 1; }
while [ -e "$STUB_NOTES/long" ] && [ ! -e "$STUB_NOTES/stop" ]; do sleep 0.1; done
""",
}


def require(*tools: str) -> None:
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")


def write_program(path: Path, code: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{code}\n", encoding="utf-8")
    path.chmod(0o755)


def one_error(result: Result) -> str:
    """Return the only line on stderr of a command that failed."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and result.returncode in (1, 2)
    return line


@pytest.mark.parametrize("script", [CONTROL, SETUP], ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    require("shellcheck")
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    assert script.stat().st_mode & stat.S_IXUSR


@dataclass
class Machine:
    """A machine, and a place to work in; names of folders are as awkward as users' are."""

    home: Path
    root: Path  # of the checkout
    notes: Path
    environment: dict[str, str]

    def run(self, *command: str | Path, stdin: str = "", **more: str) -> Result:
        return subprocess.run(
            command, cwd=self.notes, env={**self.environment, **more}, input=stdin,
            capture_output=True, text=True, timeout=120, start_new_session=True,
        )  # fmt: skip

    def setup(self, *arguments: str, **environment: str) -> Result:
        return self.run(self.root / "scripts" / SETUP.name, *arguments, **environment)

    def calls(self, program: str, word: str = "") -> list[str]:
        calls = self.notes / "calls"
        lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
        return [line for line in lines if line.split()[0] == program and word in line]

    def write_checkpoint(self, name: str, seed: int = 0) -> bytes:
        content = random.Random(f"{name} {seed}").randbytes(50_000)
        (self.root / "checkpoints" / name).write_bytes(content)
        return content


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    require("bash", "flock", "rsync", "setsid", "sha256sum", "tmux", "git")
    home, notes, commands = tmp_path / "remote home", tmp_path / "notes", tmp_path / "commands"
    root = home / "it's my run"
    for folder in (*(root / name for name in ("scripts", "config", "checkpoints", "logs")), notes):
        folder.mkdir(parents=True)
    shutil.copy(SETUP, root / "scripts")
    shutil.copy(REPOSITORY / "constraints.txt", root)
    for name in ("config/training-default.yaml", "pyproject.toml"):
        (root / name).touch()
    installed = tmp_path / "installed"
    for name, code in STUBS.items():
        write_program(installed / name, STUB + code)
    make = f'mkdir -p "$3" && cp -r {shlex.quote(str(installed))} "$3/bin"'
    write_program(commands / "python3", f'{STUB}if [ "$2" = venv ]; then {make}; fi')
    write_program(commands / "nvidia-smi", "echo 'NVIDIA GeForce RTX 4090, 24564 MiB, 570.86.15'")
    write_program(commands / "ssh", SSH.format(home=shlex.quote(str(home))))
    record = f"checkpoint_dir={root}/checkpoints\nlog_dir={root}/logs\ntensorboard_port=6006\n"
    (home / ".vlm-bridge-remote").write_text(record)
    # A socket's path may have about a hundred characters, and tmp_path has more.
    with tempfile.TemporaryDirectory(prefix="tmux") as sockets:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TMUX"))}
        machine = Machine(home, root, notes, {
            **kept, "PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"), "STUB_NOTES": str(notes), "TMUX_TMPDIR": sockets,
        })  # fmt: skip
        yield machine
        (notes / "stop").touch()
        for lock in home.glob("*/logs/.*.lock"):  # held as long as the programs run
            machine.run("flock", lock, "true")
        machine.run("tmux", "-L", "vlm-bridge", "kill-server")


# control_vastai_local.sh


@pytest.mark.parametrize(("verb", "name"), DOWNLOADS.items())
def test_each_download_brings_its_file_once(machine: Machine, verb: str, name: str) -> None:
    contents = {name: machine.write_checkpoint(name) for name in DOWNLOADS.values()}
    result = machine.run(CONTROL, verb, "me@host", "-p", "1022", "-d", "here")
    assert (result.returncode, result.stderr) == (0, "")
    assert hashlib.sha256(contents[name]).hexdigest() in result.stdout
    (file,) = (machine.notes / "here").iterdir()
    assert (file.name, file.read_bytes()) == (name, contents[name])
    assert "up to date" in machine.run(CONTROL, verb, "me@host", "-d", "here").stdout
    better = machine.write_checkpoint(name, seed=1)
    assert machine.run(CONTROL, verb, "me@host", "-d", "here").returncode == 0
    assert file.read_bytes() == better


def test_download_all_brings_checkpoints_and_logs(machine: Machine) -> None:
    assert "yet; they are written when" in one_error(machine.run(CONTROL, "download-all", "host"))
    contents = {name: machine.write_checkpoint(name) for name in DOWNLOADS.values()}
    (machine.root / "checkpoints" / ".latest_checkpoint.pth.7.tmp").write_bytes(b"half-written")
    (machine.root / "logs" / "events.out").write_bytes(b"curve")
    result = machine.run(CONTROL, "download-all", "host")
    assert (result.returncode, result.stderr) == (0, "")
    target = machine.notes / "runs" / "remote"
    found = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == {**contents, "logs/events.out": b"curve"}


def test_trouble_with_ssh_is_one_clear_line(machine: Machine, tmp_path: Path) -> None:
    for message, explained in (
        ("ssh: connect to host h port 22: Connection refused", "nothing answers SSH on port 1022"),
        ("me@h: Permission denied (publickey).", "refuses your keys"),
    ):
        write_program(tmp_path / "commands/ssh", f"echo {shlex.quote(message)} >&2; exit 255")
        assert explained in one_error(machine.run(CONTROL, "monitor", "me@h", "-p", "1022"))
    for arguments in ("", "monitor", "download host", "monitor host -p 65536"):
        assert one_error(machine.run(CONTROL, *arguments.split())).endswith("(see --help)")


# setup_vastai_remote.sh


def test_setup_installs_prepares_and_trains_once(machine: Machine, tmp_path: Path) -> None:
    first = machine.setup("--foreground")
    assert first.returncode == 0, first.stderr
    assert "GPU: NVIDIA GeForce RTX 4090, 24564 MiB, 570.86.15" in first.stdout
    transform = "vlm-data transform --source groundcap --output-dir data/groundcap"
    training = (
        "vlm-training --config config/training-default.yaml --resume auto data_dir=data/groundcap "
        f"checkpoint_dir={machine.root}/checkpoints log_dir={machine.root}/logs"
    )
    assert machine.setup("--foreground").returncode == 0
    assert machine.calls("vlm-data") == [transform]
    assert machine.calls("vlm-training") == [training] * 2
    (install,) = machine.calls("python", "pip")
    assert install.endswith("--constraint build/constraints-gpu.txt --editable .[gpu]")
    (board,) = machine.calls("tensorboard")
    (port,) = re.findall(r"--host 127\.0\.0\.1 --port (\d+)", board)
    assert f"tensorboard_port={port}" in (machine.home / ".vlm-bridge-remote").read_text()
    assert machine.setup("--config", "no/such.yaml").returncode == 2
    write_program(tmp_path / "commands" / "nvidia-smi", "exit 9")
    assert "no NVIDIA GPU" in one_error(machine.setup("--foreground"))


def test_piped_in_it_clones_and_trains(machine: Machine) -> None:
    git = ["git", "-C", str(machine.root), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    for _ in range(2):
        command = ("bash", "-s", "--", machine.root, "--foreground")
        result = machine.run(*command, stdin=SETUP.read_text(encoding="utf-8"), HF_TOKEN=TOKEN)
        assert (result.returncode, result.stderr) == (0, "") and TOKEN not in result.stdout
    assert len(machine.calls("vlm-training")) == 2 and len(machine.calls("vlm-data")) == 1


def test_a_second_run_starts_no_second_training(machine: Machine) -> None:
    (machine.notes / "long").touch()
    first = machine.setup("--watch", "1", HF_TOKEN=TOKEN)
    assert first.returncode == 0, first.stderr
    assert "training: started in tmux" in first.stdout
    while not machine.calls("vlm-training"):  # a test may take five minutes
        time.sleep(0.05)
    assert "training: runs already" in machine.setup().stdout
    assert "a training runs already" in one_error(machine.setup("--foreground"))
    assert len(machine.calls("vlm-training")) == 1
    # The token is in its file alone: not in logs, nor in the environment of a started program.
    file = machine.home / ".cache" / "huggingface" / "token"
    files = [path for folder in (machine.home, machine.notes) for path in folder.rglob("*")]
    assert [p for p in files if p.is_file() and TOKEN.encode() in p.read_bytes()] == [file]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and TOKEN not in first.stdout


def test_a_training_that_fails_at_once_is_reported(machine: Machine) -> None:
    (machine.notes / "fail").touch()
    line = one_error(machine.setup("--watch", "60"))
    assert "training ended with exit code 1: error: Gemma is gated" in line


def test_the_skypilot_task_runs_the_same_job_on_any_cloud(machine: Machine) -> None:
    task = yaml.safe_load((REPOSITORY / "scripts" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert not {"infra", "cloud", "image_id"} & task["resources"].keys()
    assert task["secrets"] == {"HF_TOKEN": None}, "asked for at launch, never written down"
    for step in ("setup", "run"):
        script = f"cd {shlex.quote(str(machine.root))}\n{task[step]}"
        result = machine.run("bash", "-c", script, HF_TOKEN=TOKEN, **task["envs"])
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stdout + result.stderr
    assert len(machine.calls("python", "pip")) == len(machine.calls("vlm-training")) == 1
