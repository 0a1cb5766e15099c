"""The scripts for rented machines; ssh, the GPU and our own commands are stubs."""

from __future__ import annotations

import fcntl
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CONTROL = REPOSITORY / "scripts" / "control_vastai_local.sh"
SETUP = REPOSITORY / "scripts" / "setup_vastai_remote.sh"
TASK = yaml.safe_load((REPOSITORY / "scripts" / "skypilot.yaml").read_text(encoding="utf-8"))
DOWNLOADS = {
    "download-best": "best_model.pth",
    "download-latest": "latest_checkpoint.pth",
    "download-weights": "best_model_weights_only.pth",
}
TOKEN = "hf_" + "x9" * 17
Result = subprocess.CompletedProcess[str]


def require(*tools: str) -> None:
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():  # a test may take five minutes
        time.sleep(0.05)


def write_program(path: Path, code: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{code}\n", encoding="utf-8")
    path.chmod(0o755)


def one_error(result: Result) -> str:
    """Return the only line on stderr of a command that failed."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("script", [CONTROL, SETUP], ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    require("shellcheck")
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    assert script.stat().st_mode & stat.S_IXUSR


# --- control_vastai_local.sh ---

# Runs the command here, in the home folder of the machine.
SSH = """
while [[ $1 == -* ]]; do case $1 in -[opil]) shift 2 ;; *) shift ;; esac; done
shift; cd {home} && HOME={home} exec bash -c "$*"
"""


@dataclass
class Machine:
    """A machine to log in to, and a folder to work in; names are as awkward as users' are."""

    home: Path
    folder: Path
    commands: Path  # stand first on the PATH

    @property
    def checkpoints(self) -> Path:
        return self.home / "it's my run" / "checkpoints"

    def control(self, *arguments: str) -> Result:
        path = f"{self.commands}:{os.environ['PATH']}"
        return subprocess.run(
            [CONTROL, *arguments], cwd=self.folder, env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def write_checkpoint(self, name: str, seed: int = 0) -> bytes:
        content = random.Random(f"{name} {seed}").randbytes(50_000)
        (self.checkpoints / name).write_bytes(content)
        return content


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    require("rsync", "bash", "sha256sum")
    machine = Machine(tmp_path / "remote home", tmp_path / "my models", tmp_path / "commands")
    machine.checkpoints.mkdir(parents=True)
    machine.folder.mkdir()
    logs = machine.checkpoints.with_name("logs")
    logs.mkdir()
    record = f"checkpoint_dir={machine.checkpoints}\nlog_dir={logs}\ntensorboard_port=6006\n"
    (machine.home / ".vlm-bridge-remote").write_text(record)
    write_program(machine.commands / "ssh", SSH.format(home=shlex.quote(str(machine.home))))
    return machine


@pytest.mark.parametrize(("verb", "name"), DOWNLOADS.items())
def test_each_download_brings_its_file_once(machine: Machine, verb: str, name: str) -> None:
    contents = {name: machine.write_checkpoint(name) for name in DOWNLOADS.values()}
    result = machine.control(verb, "me@host", "-p", "1022", "-d", "here")
    assert (result.returncode, result.stderr) == (0, "")
    assert hashlib.sha256(contents[name]).hexdigest() in result.stdout
    (file,) = (machine.folder / "here").iterdir()
    assert (file.name, file.read_bytes()) == (name, contents[name])
    assert "up to date" in machine.control(verb, "me@host", "-d", "here").stdout
    better = machine.write_checkpoint(name, seed=1)
    assert machine.control(verb, "me@host", "-d", "here").returncode == 0
    assert file.read_bytes() == better


def test_download_all_brings_checkpoints_and_logs(machine: Machine) -> None:
    contents = {name: machine.write_checkpoint(name) for name in DOWNLOADS.values()}
    (machine.checkpoints / ".latest_checkpoint.pth.7.tmp").write_bytes(b"half-written")
    (machine.checkpoints.with_name("logs") / "events.out").write_bytes(b"curve")
    result = machine.control("download-all", "host")
    assert (result.returncode, result.stderr) == (0, "")
    target = machine.folder / "runs" / "remote"
    found = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == {**contents, "logs/events.out": b"curve"}


@pytest.mark.parametrize(
    ("message", "explained"),
    [
        ("ssh: connect to host h port 22: Connection refused", "nothing answers SSH on port 1022"),
        ("me@h: Permission denied (publickey).", "refuses your keys"),
        ("Host key verification failed.", "ssh-keygen -R '[h]:1022'"),
        ("WARNING: UNPROTECTED PRIVATE KEY FILE!", "chmod 600"),
        ("ssh: Could not resolve hostname h: Name or service not known", "there is no host named h"),
    ],
)  # fmt: skip
def test_trouble_with_ssh_is_one_clear_line(machine: Machine, message: str, explained: str) -> None:
    write_program(machine.commands / "ssh", f"echo {shlex.quote(message)} >&2; exit 255")
    for verb in ("monitor", "download-all"):
        result = machine.control(verb, "me@h", "-p", "1022")
        assert result.returncode == 1 and explained in one_error(result)


def test_missing_checkpoints_or_setup_are_one_clear_line(machine: Machine) -> None:
    for verb in [*DOWNLOADS, "download-all"]:
        result = machine.control(verb, "host")
        assert result.returncode == 1 and f"in {machine.checkpoints} on" in one_error(result)
    (machine.home / ".vlm-bridge-remote").unlink()
    result = machine.control("monitor", "host")
    assert result.returncode == 1
    assert "run scripts/setup_vastai_remote.sh there first" in one_error(result)


@pytest.mark.parametrize(
    "arguments",
    ["", "monitor", "monitor host extra", "download host", "monitor host -p 65536",
     "monitor host -i no-such-key", "monitor host --port 22"],
)  # fmt: skip
def test_bad_usage_of_control_exits_with_2(machine: Machine, arguments: str) -> None:
    result = machine.control(*arguments.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert one_error(result).endswith("(see --help)")


# --- setup_vastai_remote.sh ---

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


@dataclass
class Rented:
    """A checkout on a machine with stubs for what a rented GPU would have."""

    root: Path
    home: Path
    notes: Path
    environment: dict[str, str]

    def run(self, *command: str, stdin: str = "", cwd: Path | None = None, **more: str) -> Result:
        return subprocess.run(
            command, cwd=cwd or self.home, env={**self.environment, **more}, input=stdin,
            capture_output=True, text=True, timeout=120, start_new_session=True,
        )  # fmt: skip

    def setup(self, *arguments: str, **environment: str) -> Result:
        return self.run(str(self.root / "scripts" / SETUP.name), *arguments, **environment)

    def calls(self, program: str, word: str = "") -> list[str]:
        calls = self.notes / "calls"
        lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
        return [line for line in lines if line.split()[0] == program and word in line]

    def is_held(self, lock: str) -> bool:
        with (self.root / "logs" / lock).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False


@pytest.fixture
def rented(tmp_path: Path) -> Iterator[Rented]:
    require("bash", "flock", "rsync", "setsid", "tmux", "git")
    root, home, notes = tmp_path / "my checkout", tmp_path / "home", tmp_path / "notes"
    for folder in (root / "scripts", root / "config", home, notes):
        folder.mkdir(parents=True)
    shutil.copy(SETUP, root / "scripts")
    shutil.copy(REPOSITORY / "constraints.txt", root)
    for name in ("config/training-default.yaml", "pyproject.toml"):
        (root / name).touch()
    commands, installed = tmp_path / "commands", tmp_path / "installed"
    for name, code in STUBS.items():
        write_program(installed / name, STUB + code)
    make = f'mkdir -p "$3" && cp -r {shlex.quote(str(installed))} "$3/bin"'
    write_program(commands / "python3", f'{STUB}if [ "$2" = venv ]; then {make}; fi')
    write_program(commands / "nvidia-smi", "echo 'NVIDIA GeForce RTX 4090, 24564 MiB, 570.86.15'")
    # A socket's path may have about a hundred characters, and tmp_path has more.
    with tempfile.TemporaryDirectory(prefix="tmux") as sockets:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TMUX"))}
        machine = Rented(root, home, notes, {
            **kept, "PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"), "STUB_NOTES": str(notes), "TMUX_TMPDIR": sockets,
        })  # fmt: skip
        try:
            yield machine
        finally:
            (notes / "stop").touch()
            for lock in machine.root.glob("logs/.*.lock"):
                wait_until(lambda name=lock.name: not machine.is_held(name))
            machine.run("tmux", "-L", "vlm-bridge", "kill-server")


def test_a_machine_without_a_gpu_is_refused(rented: Rented, tmp_path: Path) -> None:
    write_program(tmp_path / "commands" / "nvidia-smi", "exit 9")
    result = rented.setup("--foreground")
    assert (result.returncode, result.stdout) == (1, "")
    assert "no NVIDIA GPU" in one_error(result) and not rented.calls("vlm-training")
    assert rented.setup("--foreground", "--allow-cpu").returncode == 0
    assert len(rented.calls("vlm-training")) == 1


def test_setup_installs_prepares_and_trains_once(rented: Rented) -> None:
    first = rented.setup("--foreground")
    assert first.returncode == 0, first.stderr
    assert "GPU: NVIDIA GeForce RTX 4090, 24564 MiB, 570.86.15" in first.stdout
    transform = "vlm-data transform --source groundcap --output-dir data/groundcap"
    training = (
        "vlm-training --config config/training-default.yaml --resume auto data_dir=data/groundcap "
        f"checkpoint_dir={rented.root}/checkpoints log_dir={rented.root}/logs"
    )
    assert rented.setup("--foreground").returncode == 0
    assert rented.calls("vlm-data") == [transform]
    assert rented.calls("vlm-training") == [training] * 2
    (install,) = rented.calls("python", "pip")
    assert install.endswith("--constraint build/constraints-gpu.txt --editable .[gpu]")
    (board,) = rented.calls("tensorboard")
    (port,) = re.findall(r"--host 127\.0\.0\.1 --port (\d+)", board)
    assert f"tensorboard_port={port}" in (rented.home / ".vlm-bridge-remote").read_text()


def test_piped_in_it_clones_and_trains(rented: Rented) -> None:
    git = ["git", "-C", str(rented.root), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    repository, rented.root = str(rented.root), rented.home / "vlm-bridge"
    for _ in range(2):
        command = ("bash", "-s", "--", repository, "--foreground")
        script = SETUP.read_text(encoding="utf-8")
        result = rented.run(*command, stdin=script, HF_TOKEN=TOKEN)
        assert (result.returncode, result.stderr) == (0, "") and TOKEN not in result.stdout
    assert len(rented.calls("vlm-training")) == 2 and len(rented.calls("vlm-data")) == 1
    missing = rented.run("bash", str(shutil.copy(SETUP, rented.notes)), "nowhere", cwd=rented.notes)
    assert missing.returncode == 1 and "cannot clone: fatal: repository" in one_error(missing)


def test_a_second_run_starts_no_second_training(rented: Rented) -> None:
    (rented.notes / "long").touch()
    first = rented.setup("--watch", "1", HF_TOKEN=TOKEN)
    assert first.returncode == 0, first.stderr
    assert "training: started in tmux" in first.stdout
    wait_until(lambda: rented.is_held(".training.lock") and rented.calls("vlm-training"))
    second = rented.setup()
    assert (second.returncode, second.stderr) == (0, "")
    assert "training: runs already" in second.stdout
    assert "a training runs already" in one_error(rented.setup("--foreground"))
    assert len(rented.calls("vlm-training")) == 1
    # The token is in its file alone: not in logs, nor in the environment of a started program.
    file = rented.home / ".cache" / "huggingface" / "token"
    files = [p for f in (rented.home, rented.root, rented.notes) for p in f.rglob("*")]
    assert [p for p in files if p.is_file() and TOKEN.encode() in p.read_bytes()] == [file]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and TOKEN not in first.stdout


def test_a_training_that_fails_at_once_is_reported(rented: Rented) -> None:
    (rented.notes / "fail").touch()
    result = rented.setup("--watch", "60")
    assert result.returncode == 1
    assert "training ended with exit code 1: error: Gemma is gated" in one_error(result)


@pytest.mark.parametrize(
    "arguments", ["--config", "--config no/such.yaml", "--watch long", "--no-such-option", "extra"]
)
def test_bad_usage_of_setup_exits_with_2(rented: Rented, arguments: str) -> None:
    result = rented.setup(*arguments.split())
    assert (result.returncode, result.stdout) == (2, "")
    one_error(result)


# --- skypilot.yaml and the guide ---


def test_the_skypilot_task_runs_the_same_job_on_any_cloud(rented: Rented) -> None:
    assert not {"infra", "cloud", "image_id"} & TASK["resources"].keys()
    assert TASK["secrets"] == {"HF_TOKEN": None}, "asked for at launch, never written down"
    for step in ("setup", "run"):
        assert not rented.calls("vlm-training")
        command = ("bash", "-c", TASK[step])
        result = rented.run(*command, cwd=rented.root, HF_TOKEN=TOKEN, **TASK["envs"])
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stdout + result.stderr
    assert len(rented.calls("python", "pip")) == len(rented.calls("vlm-training")) == 1
