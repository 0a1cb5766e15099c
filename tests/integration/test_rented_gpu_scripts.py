"""The scripts for rented machines, against a real sshd on 127.0.0.1, real rsync and real tmux.

The machine is this one: an SSH server that the test starts, with keys that the test makes, lands in a home folder
below ``tmp_path``. Only the GPU, Python and our own commands are stubs, because this test is about none of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pty
import pwd
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CONTROL = REPOSITORY / "scripts" / "control_vastai_local.sh"
SETUP = REPOSITORY / "scripts" / "setup_vastai_remote.sh"
SKYPILOT = REPOSITORY / "scripts" / "skypilot.yaml"
GUIDE = REPOSITORY / "docs" / "rented-gpus.md"
DOWNLOADS = {
    "download-best": "best_model.pth",
    "download-latest": "latest_checkpoint.pth",
    "download-weights": "best_model_weights_only.pth",
}
TOKEN = "hf_" + "x9" * 17


def require(*tools: str) -> None:
    """Skip the test where a program is missing."""
    missing = [
        tool for tool in tools if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing:
        pytest.skip(
            f"needs {', '.join(missing)} (Debian: openssh-server openssh-client rsync tmux shellcheck)"
        )


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.05)


def write_program(path: Path, code: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + code, encoding="utf-8")
    path.chmod(0o755)
    return path


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it ended meanwhile
            continue
        if parent == pid:
            found.append(int(status.parent.name))
    return found


def program_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:  # it ended meanwhile
        return ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


# --- a machine to log in to ---------------------------------------------------------------------------------------


@dataclass
class Machine:
    """An SSH server with a home folder; names are as awkward as users' are."""

    port: int
    key: Path
    home: Path
    commands: Path
    """Programs that stand first on the PATH of this side."""
    server: subprocess.Popen[bytes]

    @property
    def run(self) -> Path:
        return self.home / "it's my run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def address(self) -> list[str]:
        return [
            f"{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1",
            "-p",
            str(self.port),
            "-i",
            str(self.key),
        ]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.commands}:{os.environ['PATH']}"}

    def control(self, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(CONTROL), *map(str, arguments)],
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def start_control(self, *arguments: object, cwd: Path) -> subprocess.Popen[str]:
        """In a process group of its own, as a terminal would start it."""
        return subprocess.Popen(
            [str(CONTROL), *map(str, arguments)],
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def write_record(self, tensorboard_port: int = 6006) -> None:
        (self.home / ".vlm-bridge-remote").write_text(
            f"checkpoint_dir={self.checkpoints}\nlog_dir={self.run / 'logs'}\ntensorboard_port={tensorboard_port}\n"
        )

    def drop_connections(self) -> None:
        """Kill the server's side of every connection, and nothing that was started through one."""
        connections = children_of(self.server.pid)
        # The process that talks is the first one's child, except where root logs in as root.
        talking = [
            pid
            for connection in connections
            for pid in children_of(connection)
            if program_name(pid).startswith("sshd")
        ]
        for pid in [*talking, *connections]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    require("sshd", "ssh", "ssh-keygen", "rsync", "bash")
    folder = tmp_path / "machine"
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    key, host_key = tmp_path / "my keys" / "it's a key", folder / "host_key"
    key.parent.mkdir()
    for path in (key, host_key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    shutil.copy(f"{key}.pub", folder / "authorized_keys")
    # sshd would start in this user's real home, and bash would read its .bashrc first.
    login = write_program(
        folder / "login",
        f'cd {shlex.quote(str(home))} && exec bash -c "$SSH_ORIGINAL_COMMAND"\n',
    )
    port = free_port()
    settings = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": host_key,
        "AuthorizedKeysFile": folder / "authorized_keys",
        "ForceCommand": login,
        "SetEnv": f"HOME={home}",
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
    }
    config = folder / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    if os.getuid() == 0:  # where systemd would have made it
        Path("/run/sshd").mkdir(exist_ok=True)
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([str(sshd), "-D", "-e", "-f", str(config)], stderr=log)
    # Nobody's configuration and known hosts but those of this test.
    commands = tmp_path / "commands"
    known_hosts = folder / "known_hosts"
    program = shlex.join(
        [str(shutil.which("ssh")), "-F", "/dev/null", "-o", f"UserKnownHostsFile={known_hosts}"]
    )
    write_program(commands / "ssh", f'exec {program} "$@"\n')
    machine = Machine(port, key, home, commands, server)
    machine.checkpoints.mkdir(parents=True)
    (machine.run / "logs").mkdir()
    machine.write_record()
    try:
        wait_until(lambda: server.poll() is not None or listens(port), "sshd listens")
        assert server.poll() is None, (folder / "sshd.log").read_text()
        user, *_ = machine.address
        knock = ["-o", "StrictHostKeyChecking=no", "-p", str(port), "-i", str(key), user, "true"]
        subprocess.run([commands / "ssh", *knock], capture_output=True, timeout=120)
        if refusal := re.search(
            r"User .* not allowed because .*", (folder / "sshd.log").read_text()
        ):
            pytest.skip(f"sshd lets nobody in here: {refusal[0]}")
        known_hosts.unlink(missing_ok=True)
        yield machine
    finally:
        machine.drop_connections()
        server.terminate()
        server.wait(60)


def write_checkpoint(machine: Machine, name: str, size: int = 50_000, seed: int = 0) -> bytes:
    content = random.Random(f"{name} {seed}").randbytes(size)
    (machine.checkpoints / name).write_bytes(content)
    return content


def wrap_rsync(machine: Machine, code: str) -> None:
    """Put a program before rsync on this side's PATH; in ``code``, RSYNC is the real one."""
    write_program(machine.commands / "rsync", code.replace("RSYNC", str(shutil.which("rsync"))))


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr of a command that failed."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


# --- control_vastai_local.sh --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [CONTROL, SETUP], ids=lambda path: path.name)
def test_shellcheck_is_content(script: Path) -> None:
    require("shellcheck")
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert result.stdout + result.stderr == ""
    assert result.returncode == 0
    assert script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize(("verb", "name"), DOWNLOADS.items())
def test_each_download_brings_its_file(
    machine: Machine, tmp_path: Path, verb: str, name: str
) -> None:
    contents = {name: write_checkpoint(machine, name) for name in DOWNLOADS.values()}
    target = tmp_path / "my models"
    result = machine.control(verb, *machine.address, "-d", target, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert hashlib.sha256(contents[name]).hexdigest() in result.stdout
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {name: contents[name]}


def test_download_all_brings_checkpoints_and_logs(machine: Machine, tmp_path: Path) -> None:
    contents = {name: write_checkpoint(machine, name) for name in DOWNLOADS.values()}
    (machine.checkpoints / ".latest_checkpoint.pth.7.tmp").write_bytes(b"half-written")
    (machine.run / "logs" / "events.out").write_bytes(b"curve")
    (machine.run / "logs" / ".training.lock").touch()
    result = machine.control("download-all", *machine.address, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    target = tmp_path / "runs" / "remote"
    found = {
        str(path.relative_to(target)): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file()
    }
    assert found == {**contents, "logs/events.out": b"curve"}


def test_a_file_that_is_here_is_not_fetched_again_until_it_changes(
    machine: Machine, tmp_path: Path
) -> None:
    write_checkpoint(machine, "best_model.pth")
    arguments = ("download-best", *machine.address, "-d", "models")
    machine.control(*arguments, cwd=tmp_path)
    wrap_rsync(machine, "echo called >&2; exit 99\n")
    again = machine.control(*arguments, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert "up to date" in again.stdout
    (machine.commands / "rsync").unlink()
    better = write_checkpoint(machine, "best_model.pth", seed=1)
    assert machine.control(*arguments, cwd=tmp_path).returncode == 0
    assert (tmp_path / "models" / "best_model.pth").read_bytes() == better


def test_an_interrupted_download_goes_on_where_it_stopped(machine: Machine, tmp_path: Path) -> None:
    content = write_checkpoint(machine, "latest_checkpoint.pth", size=3_000_000)
    wrap_rsync(machine, 'exec RSYNC --bwlimit=200 "$@"\n')
    arguments = ("download-latest", *machine.address, "-d", "models")
    download = machine.start_control(*arguments, cwd=tmp_path)
    part = tmp_path / "models" / ".latest_checkpoint.pth.part"
    wait_until(lambda: part.exists() and part.stat().st_size > 600_000, "a fifth has arrived")
    os.killpg(download.pid, signal.SIGINT)
    _, stderr = download.communicate(timeout=120)
    assert (download.returncode, stderr) == (130, "interrupted\n")
    assert not (tmp_path / "models" / "latest_checkpoint.pth").exists()

    wrap_rsync(machine, f'exec RSYNC --stats "$@" >{shlex.quote(str(tmp_path / "statistics"))}\n')
    result = machine.control(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    sent = re.search(r"Literal data: ([\d,]+)", (tmp_path / "statistics").read_text())
    assert sent is not None
    assert int(sent[1].replace(",", "")) < 2_500_000, "what had arrived was sent again"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["latest_checkpoint.pth"]
    assert (tmp_path / "models" / "latest_checkpoint.pth").read_bytes() == content


def test_a_download_outlives_a_broken_connection(machine: Machine, tmp_path: Path) -> None:
    content = write_checkpoint(machine, "best_model.pth", size=3_000_000)
    marker = tmp_path / "slow once"
    wrap_rsync(
        machine,
        f'[ -e "{marker}" ] || set -- --bwlimit=200 "$@"\ntouch "{marker}"\nexec RSYNC "$@"\n',
    )
    download = machine.start_control(
        "download-best", *machine.address, "-d", "models", cwd=tmp_path
    )
    part = tmp_path / "models" / ".best_model.pth.part"
    wait_until(lambda: part.exists() and part.stat().st_size > 300_000, "the download is under way")
    machine.drop_connections()
    _, stderr = download.communicate(timeout=120)
    assert download.returncode == 0, stderr
    assert stderr.endswith("trying again\n")
    assert (tmp_path / "models" / "best_model.pth").read_bytes() == content


def test_a_file_that_changes_under_way_is_copied_again(machine: Machine, tmp_path: Path) -> None:
    write_checkpoint(machine, "best_model.pth")
    later = random.Random(1).randbytes(50_000)
    (tmp_path / "later").write_bytes(later)
    original, marker = machine.checkpoints / "best_model.pth", tmp_path / "changed"
    wrap_rsync(
        machine,
        f'RSYNC "$@" || exit\n[ -e {marker} ] || cp {tmp_path}/later {shlex.quote(str(original))}\ntouch {marker}\n',
    )
    result = machine.control("download-best", *machine.address, "-d", "models", cwd=tmp_path)
    assert result.returncode == 0
    assert "changed on the machine" in result.stderr
    assert (tmp_path / "models" / "best_model.pth").read_bytes() == later


def test_a_file_that_never_holds_still_is_refused(machine: Machine, tmp_path: Path) -> None:
    write_checkpoint(machine, "best_model.pth")
    original = shlex.quote(str(machine.checkpoints / "best_model.pth"))
    wrap_rsync(machine, f'RSYNC "$@" || exit\nhead -c 50000 /dev/urandom >{original}\n')
    result = machine.control("download-best", *machine.address, "-d", "models", cwd=tmp_path)
    assert result.returncode == 1
    assert "error: best_model.pth was not copied: its checksum differs" in result.stderr
    assert not (tmp_path / "models" / "best_model.pth").exists()


@pytest.fixture
def dashboard(machine: Machine) -> Iterator[bytes]:
    """What stands for TensorBoard on the machine: a page that only the tunnel can show at the port it announces."""
    page = b"loss curves"

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        machine.write_record(tensorboard_port=server.server_address[1])
        yield page
        server.shutdown()


@pytest.mark.parametrize("loss", ["the tunnel's ssh is killed", "the machine drops the connection"])
def test_the_tunnel_comes_back(
    machine: Machine, tmp_path: Path, dashboard: bytes, loss: str
) -> None:
    monitor = machine.start_control("monitor", *machine.address, cwd=tmp_path)
    assert monitor.stdout is not None

    def announced_page() -> tuple[str, bytes]:
        assert monitor.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", monitor.stdout.readline())
        assert found is not None
        with urllib.request.urlopen(found[0], timeout=10) as answer:
            return found[0], answer.read()

    try:
        url, page = announced_page()
        assert page == dashboard
        if loss.startswith("the machine"):
            machine.drop_connections()
        else:
            (tunnel,) = children_of(monitor.pid)
            os.kill(tunnel, signal.SIGKILL)
        assert announced_page() == (url, dashboard)
        (tunnel,) = children_of(monitor.pid)
    finally:
        monitor.terminate()
        _, stderr = monitor.communicate(timeout=120)
    assert monitor.returncode == 143
    assert re.fullmatch(r"tunnel closed: .+; opening it again in 1 s\n", stderr)
    wait_until(lambda: not listens(int(url.rpartition(":")[2])), "the tunnel ends with the script")


def test_a_wrong_port_is_one_clear_line(machine: Machine, tmp_path: Path) -> None:
    user, _, _, *key = machine.address
    port = free_port()
    result = machine.control("download-best", user, "-p", port, *key, cwd=tmp_path)
    assert result.returncode == 1
    assert f"nothing answers SSH on port {port}" in one_error(result)


def test_a_wrong_key_is_one_clear_line(machine: Machine, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    user, _, port, *_ = machine.address
    for verb in ("monitor", "download-all"):
        result = machine.control(verb, user, "-p", port, "-i", other, cwd=tmp_path)
        assert result.returncode == 1
        assert f"refuses the key {other}:" in one_error(result)


def test_a_key_that_others_may_read_is_one_clear_line(machine: Machine, tmp_path: Path) -> None:
    machine.key.chmod(0o644)
    result = machine.control("monitor", *machine.address, cwd=tmp_path)
    assert result.returncode == 1
    assert f"chmod 600 '{machine.key}'" in one_error(result)


def test_another_machine_at_the_same_address_is_one_clear_line(
    machine: Machine, tmp_path: Path
) -> None:
    write_checkpoint(machine, "best_model.pth")
    machine.control("download-best", *machine.address, cwd=tmp_path)
    known_hosts = tmp_path / "machine" / "known_hosts"
    stranger = (tmp_path / "machine" / "authorized_keys").read_text().split()[1]
    host, kind, _ = known_hosts.read_text().split()[:3]
    known_hosts.write_text(f"{host} {kind} {stranger}\n")
    result = machine.control("download-best", *machine.address, cwd=tmp_path)
    assert result.returncode == 1
    assert f"ssh-keygen -R '[127.0.0.1]:{machine.port}'" in one_error(result)


def test_what_is_not_there_yet_is_one_clear_line(machine: Machine, tmp_path: Path) -> None:
    for verb in [*DOWNLOADS, "download-all"]:
        result = machine.control(verb, *machine.address, cwd=tmp_path)
        assert result.returncode == 1
        assert f"in {machine.checkpoints} on" in one_error(result)
    (machine.home / ".vlm-bridge-remote").unlink()
    result = machine.control("monitor", *machine.address, cwd=tmp_path)
    assert result.returncode == 1
    assert "run scripts/setup_vastai_remote.sh there first" in one_error(result)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "monitor",
        "monitor host extra",
        "download host",
        "monitor host -p",
        "monitor host -p ssh",
        "monitor host -p 65536",
        "monitor host -i no-such-key",
        "monitor host --port 22",
    ],
)
def test_bad_usage_of_control_exits_with_2(tmp_path: Path, arguments: str) -> None:
    result = subprocess.run(
        [str(CONTROL), *arguments.split()], cwd=tmp_path, capture_output=True, text=True, timeout=20
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert one_error(result).endswith("(see --help)")


def test_a_quoted_tilde_is_still_home(machine: Machine, tmp_path: Path) -> None:
    content = write_checkpoint(machine, "best_model.pth")
    home = tmp_path / "own home"
    shutil.copytree(machine.key.parent, home / "keys")
    user, _, port, *_ = machine.address
    result = subprocess.run(
        [
            str(CONTROL),
            "download-best",
            user,
            "-p",
            port,
            "-i",
            "~/keys/it's a key",
            "-d",
            "~/models",
        ],
        cwd=tmp_path,
        env={**machine.environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (home / "models" / "best_model.pth").read_bytes() == content


# --- setup_vastai_remote.sh ---------------------------------------------------------------------------------------

# Each stub notes that it was called and what it found in its environment; what else it does is below.
STUB = """
printf '%s\\n' "${0##*/} $*" >>"$STUB_NOTES/calls"
env >>"$STUB_NOTES/environments"
"""
STUBS = {
    "python": "",
    "tensorboard": 'while [ ! -e "$STUB_NOTES/stop" ]; do sleep 0.1; done\n',
    "vlm-data": 'for last; do :; done; mkdir -p "$last"; touch "$last/manifest.json"\n',
    # Runs until it is stopped if a test asks for that, and saves on Ctrl-c like the real one.
    "vlm-training": """
[ ! -e "$STUB_NOTES/fail" ] || { echo 'error: Gemma is gated' >&2; exit 1; }
trap 'echo saved; exit 130' INT
while [ -e "$STUB_NOTES/long" ] && [ ! -e "$STUB_NOTES/stop" ]; do sleep 0.1; date >"$STUB_NOTES/heartbeat"; done
""",
}


@dataclass
class Rented:
    """A checkout on a machine with stubs for what a rented GPU would have."""

    root: Path
    home: Path
    notes: Path
    environment: dict[str, str]

    @property
    def script(self) -> Path:
        return self.root / "scripts" / SETUP.name

    @property
    def log(self) -> str:
        return (self.root / "logs" / "training.log").read_text(encoding="utf-8")

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.script), *arguments],
            cwd=self.home,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self, program: str) -> list[str]:
        calls = self.notes / "calls"
        lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
        return [line for line in lines if line.split()[0] == program]

    def tmux(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["tmux", "-L", "vlm-bridge", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
        )

    def is_held(self, lock: str) -> bool:
        with (self.root / "logs" / lock).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def trains(self) -> bool:
        return (self.notes / "heartbeat").exists() and self.is_held(".training.lock")


@pytest.fixture
def rented(tmp_path: Path) -> Iterator[Rented]:
    require("bash", "flock", "rsync", "setsid", "tmux")
    root, home, notes = tmp_path / "my checkout", tmp_path / "machine" / "home", tmp_path / "notes"
    for folder in (root / "scripts", root / "config", home, notes):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SETUP, root / "scripts")
    (root / "config" / "training-default.yaml").touch()
    (root / "pyproject.toml").touch()
    shutil.copy(SETUP.parents[1] / "constraints.txt", root)
    commands, environment_programs = tmp_path / "rented commands", tmp_path / "environment programs"
    for name, code in STUBS.items():
        write_program(environment_programs / name, STUB + code)
    programs = shlex.quote(str(environment_programs))
    write_program(
        commands / "python3",
        STUB + f'if [ "$2" = venv ]; then mkdir -p "$3" && cp -r {programs} "$3/bin"; fi\n',
    )
    write_program(
        commands / "nvidia-smi", STUB + "echo 'NVIDIA GeForce RTX 4090, 24564 MiB, 570.86.15'\n"
    )
    # A socket's path may have about a hundred characters, and tmp_path has more.
    with tempfile.TemporaryDirectory(prefix="tmux") as sockets:
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("HF_", "TMUX"))
            },
            "PATH": f"{commands}:{os.environ['PATH']}",
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "STUB_NOTES": str(notes),
            "TMUX_TMPDIR": sockets,
        }
        machine = Rented(root, home, notes, environment)
        try:
            yield machine
        finally:
            (notes / "stop").touch()
            if (root / "logs").exists():
                for lock in (".training.lock", ".tensorboard.lock"):
                    wait_until(lambda lock=lock: not machine.is_held(lock), f"{lock} is free")
            machine.tmux("kill-server")


def test_a_machine_without_a_gpu_is_refused(rented: Rented, tmp_path: Path) -> None:
    write_program(tmp_path / "rented commands" / "nvidia-smi", "exit 9\n")
    result = rented.setup("--foreground")
    assert (result.returncode, result.stdout) == (1, "")
    assert "no NVIDIA GPU" in one_error(result)
    assert not rented.calls("vlm-training")

    result = rented.setup("--foreground", "--allow-cpu")
    assert result.returncode == 0, result.stderr
    assert len(rented.calls("vlm-training")) == 1


def test_setup_installs_prepares_and_trains_once(rented: Rented) -> None:
    first = rented.setup("--foreground")
    assert first.returncode == 0, first.stderr
    assert "GPU: NVIDIA GeForce RTX 4090, 24564 MiB, 570.86.15" in first.stdout
    assert rented.calls("vlm-data") == [
        "vlm-data transform --source groundcap --output-dir data/groundcap"
    ]
    folders = f"data_dir=data/groundcap checkpoint_dir={rented.root}/checkpoints log_dir={rented.root}/logs"
    training = f"vlm-training --config config/training-default.yaml --resume auto {folders}"
    assert rented.calls("vlm-training") == [training]
    (install,) = (call for call in rented.calls("python") if "pip" in call)
    assert install.endswith("--constraint build/constraints-gpu.txt --editable .[gpu]"), (
        "the tested versions"
    )

    assert rented.setup("--foreground").returncode == 0
    assert len(rented.calls("vlm-data")) == 1, "finished data are not made again"
    assert len([call for call in rented.calls("python") if "pip" in call]) == 1
    assert rented.calls("vlm-training")[1] == training, "from where it stands"


def piped(
    rented: Rented, folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`cat scripts/setup_vastai_remote.sh | bash -s -- ...`, without a terminal that could be asked."""
    return subprocess.run(
        ["bash", "-s", "--", *arguments],
        cwd=folder,
        env={**rented.environment, **environment},
        input=SETUP.read_text(encoding="utf-8"),
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )


@pytest.fixture
def repository(rented: Rented) -> Path:
    """The checkout as something that can be cloned."""
    require("git")
    git = ["git", "-C", str(rented.root), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    return rented.root


def test_piped_in_it_clones_installs_prepares_and_trains(rented: Rented, repository: Path) -> None:
    rented.root = rented.home / "vlm-bridge"  # where its locks will be
    first = piped(rented, rented.home, str(repository), "--foreground", HF_TOKEN=TOKEN)
    assert (first.returncode, first.stderr) == (0, "")
    assert f"cloning into {rented.root}" in first.stdout
    assert "Hugging Face token: stored" in first.stdout and TOKEN not in first.stdout
    (training,) = rented.calls("vlm-training")
    assert training.endswith(f"checkpoint_dir={rented.root}/checkpoints log_dir={rented.root}/logs")
    (install,) = (call for call in rented.calls("python") if "pip" in call)
    assert "--constraint build/constraints-gpu.txt" in install

    # The same line again, there or in the checkout, with or without the URL: it goes on.
    for folder, arguments in (
        (rented.home, [str(repository)]), (rented.root, [str(repository)]), (rented.root / "config", []),
    ):  # fmt: skip
        again = piped(rented, folder, *arguments, "--foreground")
        assert (again.returncode, again.stderr) == (0, "")
        assert "cloning" not in again.stdout
    assert rented.calls("vlm-training") == [training] * 4
    assert len(rented.calls("vlm-data")) == 1
    assert len([call for call in rented.calls("python") if "pip" in call]) == 1


def test_fetched_alone_it_clones_too(rented: Rented, repository: Path) -> None:
    alone = Path(shutil.copy(SETUP, rented.home / "setup.sh"))
    rented.root = rented.home / "vlm-bridge"
    result = subprocess.run(
        ["bash", str(alone), str(repository), "--install-only"],
        cwd=rented.home, env=rented.environment, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert (rented.root / ".venv" / ".installed-gpu").exists()


def test_piped_in_without_a_repository_it_says_how_it_is_used(rented: Rented) -> None:
    for arguments in ([], ["--foreground"]):
        result = piped(rented, rented.home, *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert "bash -s -- URL_OR_PATH (see --help)" in one_error(result)
    usage = piped(rented, rented.home, "--help")
    assert (usage.returncode, usage.stderr) == (0, "") and usage.stdout.startswith("Usage: ")


def test_what_cannot_be_cloned_is_one_clear_line(rented: Rented, repository: Path) -> None:
    result = piped(rented, rented.home, str(rented.home / "nowhere"))
    assert result.returncode == 1
    assert "cannot clone: fatal: repository" in one_error(result)
    (repository / "scripts" / SETUP.name).unlink()
    subprocess.run(
        [
            "git",
            "-C",
            repository,
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b.example",
            "commit",
            "-qam",
            "b",
        ],
        check=True,
    )
    result = piped(rented, rented.home, str(repository))
    assert result.returncode == 1
    assert "the repository is not vlm-bridge" in one_error(result)
    (rented.home / "vlm-bridge").mkdir()
    result = piped(rented, rented.home, str(repository))
    assert result.returncode == 1
    assert "is in the way" in one_error(result)


def test_half_a_download_runs_nothing(rented: Rented) -> None:
    script = SETUP.read_text(encoding="utf-8")
    for end in range(0, len(script) - len('main "$@"\n'), 997):
        result = subprocess.run(
            ["bash", "-s", "--", "--install-only"], cwd=rented.root, env=rented.environment, text=True,
            input=script[:end], capture_output=True, timeout=60,
        )  # fmt: skip
        assert result.stdout == ""
    assert not rented.calls("python3") and not rented.calls("nvidia-smi")


def test_data_of_the_original_project_are_used_as_they_are(rented: Rented) -> None:
    folder = rented.root / "data" / "groundcap" / "train"
    folder.mkdir(parents=True)
    (folder / "captions.jsonl").touch()
    assert rented.setup("--foreground").returncode == 0
    assert not rented.calls("vlm-data") and len(rented.calls("vlm-training")) == 1
    (folder.parent / ".unfinished").mkdir()
    assert rented.setup("--foreground").returncode == 0
    assert len(rented.calls("vlm-data")) == 1, "a transformation of ours that was interrupted"


def test_tensorboard_is_for_this_machine_alone(rented: Rented) -> None:
    assert rented.setup("--foreground").returncode == 0
    assert rented.setup("--foreground").returncode == 0
    (call,) = rented.calls("tensorboard")
    port = re.search(r"--host 127\.0\.0\.1 --port (\d+)", call)
    assert port is not None
    record = (rented.home / ".vlm-bridge-remote").read_text().splitlines()
    assert f"tensorboard_port={port[1]}" in record


def test_a_second_run_starts_no_second_training(rented: Rented) -> None:
    (rented.notes / "long").touch()
    first = rented.setup("--watch", "1")
    assert first.returncode == 0, first.stderr
    assert "training: started in tmux" in first.stdout
    wait_until(rented.trains, "the training runs")
    second = rented.setup()
    assert (second.returncode, second.stderr) == (0, "")
    assert "training: runs already" in second.stdout
    assert "a training runs already" in one_error(rented.setup("--foreground"))
    assert len(rented.calls("vlm-training")) == 1

    # A training outside tmux counts as well.
    rented.tmux("send-keys", "-t", "vlm-bridge", "C-c")
    wait_until(lambda: not rented.trains(), "Ctrl-c ends the training")
    wait_until(
        lambda: rented.log.endswith("saved\nended with exit code 130\n"),
        "its last words are logged",
    )
    outside = subprocess.Popen(
        [str(rented.script), "--foreground"],
        env=rented.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_until(rented.trains, "the training outside tmux runs")
    third = rented.setup("--watch", "60")
    assert third.returncode == 1
    assert "a training runs already" in one_error(third)
    assert len(rented.calls("vlm-training")) == 2
    (rented.notes / "stop").touch()
    assert outside.wait(120) == 0


def test_a_training_that_fails_at_once_is_told(rented: Rented) -> None:
    (rented.notes / "fail").touch()
    result = rented.setup("--watch", "60")
    assert result.returncode == 1
    assert "training ended with exit code 1: error: Gemma is gated" in one_error(result)


def test_training_survives_the_connection_that_started_it(
    rented: Rented, machine: Machine, tmp_path: Path
) -> None:
    (rented.notes / "long").touch()
    names = ("PATH", "STUB_NOTES", "TMUX_TMPDIR", "XDG_CACHE_HOME")
    settings = [f"{name}={rented.environment[name]}" for name in names]
    user, _, port, _, key = machine.address
    command = shlex.join(["env", *settings, str(rented.script), "--watch", "60"])
    options = ["-o", "StrictHostKeyChecking=accept-new", "-p", port, "-i", key]
    ssh = subprocess.Popen(
        [machine.commands / "ssh", *options, user, command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_until(lambda: rented.trains() or ssh.poll() is not None, "the training runs")
    machine.drop_connections()
    output, _ = ssh.communicate(timeout=120)
    assert ssh.returncode == 255, output
    (rented.notes / "heartbeat").unlink()
    wait_until(rented.trains, "the training still runs")
    assert rented.is_held(".tensorboard.lock"), "and so does TensorBoard"

    # The other script finds it without being told where the checkout is.
    (rented.root / "checkpoints" / "best_model.pth").write_bytes(b"trained")
    result = machine.control("download-best", *machine.address, "-d", "models", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "models" / "best_model.pth").read_bytes() == b"trained"


def token_traces(rented: Rented) -> list[Path]:
    """Files below the machine's folders that hold the token."""
    folders = (rented.home, rented.root, rented.notes)
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


def test_the_token_is_in_its_file_and_nowhere_else(rented: Rented) -> None:
    (rented.notes / "long").touch()
    result = rented.setup("--watch", "1", HF_TOKEN=TOKEN)
    assert result.returncode == 0, result.stderr
    wait_until(rented.trains, "the training runs")
    assert TOKEN not in result.stdout + result.stderr
    assert TOKEN not in rented.tmux("show-environment", "-g").stdout
    file = rented.home / ".cache" / "huggingface" / "token"
    assert token_traces(rented) == [file], (
        "neither in logs nor in the environment of what was started"
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    read = subprocess.run(
        [sys.executable, "-c", "from huggingface_hub import get_token; print(get_token())"],
        env=rented.environment,
        capture_output=True,
        text=True,
    )
    assert read.stdout.strip() == TOKEN, "huggingface_hub finds it there"


def test_the_token_is_asked_for_without_echo(rented: Rented) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(rented.script), "--foreground"],
        env=rented.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    while b"Enter for none" not in shown:
        shown += os.read(ours, 1024)
    time.sleep(0.2)  # the question is printed an instant before echo is off
    os.write(ours, TOKEN.encode() + b"\n")
    while True:
        try:
            shown += os.read(ours, 1024)
        except OSError:  # the other end is closed
            break
    assert process.wait(120) == 0, shown
    os.close(ours)
    assert TOKEN.encode() not in shown
    assert (rented.home / ".cache" / "huggingface" / "token").read_text() == TOKEN
    assert len(token_traces(rented)) == 1

    assert "Hugging Face token: found" in rented.setup("--foreground").stdout, (
        "it is asked for once"
    )


@pytest.mark.parametrize(
    "arguments", ["--config", "--config no/such.yaml", "--watch long", "--no-such-option", "extra"]
)
def test_bad_usage_of_setup_exits_with_2(rented: Rented, arguments: str) -> None:
    result = rented.setup(*arguments.split())
    assert (result.returncode, result.stdout) == (2, "")
    one_error(result)


# --- skypilot.yaml and the guide ----------------------------------------------------------------------------------

# SkyPilot's task fields (docs.skypilot.co, "SkyPilot YAML"; version 0.14), those that this task may come to need.
TASK_FIELDS = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "file_mounts",
    "setup",
    "run",
    "envs",
    "secrets",
}
RESOURCE_FIELDS = {
    "infra", "accelerators", "cpus", "memory", "instance_type", "use_spot", "disk_size", "image_id", "ports",
    "labels", "autostop", "any_of", "ordered", "job_recovery", "max_hourly_cost",
}  # fmt: skip


def test_the_skypilot_task_has_fields_that_skypilot_knows() -> None:
    task = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))
    assert task.keys() <= TASK_FIELDS
    resources = task["resources"]
    assert resources.keys() <= RESOURCE_FIELDS
    assert not {"infra", "cloud", "image_id"} & resources.keys(), "the same task runs on any cloud"
    assert all(isinstance(count, int) for count in resources["accelerators"].values())
    assert resources["autostop"].keys() <= {"idle_minutes", "down", "wait_for"}
    # vast.ai has no mounted buckets, disk tiers or several nodes.
    assert not {"file_mounts", "num_nodes"} & task.keys()
    assert task["secrets"] == {"HF_TOKEN": None}, "asked for at launch, never written down"
    assert all(isinstance(value, str) for value in task["envs"].values())


def test_the_skypilot_task_runs_the_same_job(rented: Rented) -> None:
    task = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))
    environment = {**rented.environment, **task["envs"], "HF_TOKEN": TOKEN}
    for step in ("setup", "run"):
        assert not rented.calls("vlm-training")
        result = subprocess.run(
            ["bash", "-c", task[step]],
            cwd=rented.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stdout + result.stderr
    assert len([call for call in rented.calls("python") if "pip" in call]) == 1
    (training,) = rented.calls("vlm-training")
    assert training.startswith(
        "vlm-training --config config/training-default.yaml --resume auto data_dir=data/groundcap"
    )


def test_the_guide_names_scripts_and_commands_that_exist() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    for name in re.findall(r"scripts/[\w.]+", guide):
        assert (REPOSITORY / name.rstrip(".")).is_file(), name
    known = {"monitor", "download-all", *DOWNLOADS}
    assert set(re.findall(r"control_vastai_local\.sh ([a-z-]+)", guide)) <= known
    assert known <= set(re.findall(r"[a-z-]+", guide))
    options = set(re.findall(r"(?m)^  (--[a-z-]+)", SETUP.read_text(encoding="utf-8")))
    used = {
        option
        for line in re.findall(r"setup_vastai_remote\.sh(.*)", guide)
        for option in re.findall(r"--[a-z-]+", line.partition("#")[0])
    }
    assert used <= options
