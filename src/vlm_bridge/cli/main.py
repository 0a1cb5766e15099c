"""The command line. Commands import heavy packages themselves, which keeps --help instant."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

import typer

from vlm_bridge import __version__
from vlm_bridge.cli.caption import caption, demo
from vlm_bridge.cli.data import app as data_app
from vlm_bridge.cli.evaluate import compare, evaluate, report
from vlm_bridge.cli.tools import average, doctor, export, features, info, new_decoder
from vlm_bridge.cli.train import quickstart, train
from vlm_bridge.cli.weights import weights
from vlm_bridge.credentials import redact
from vlm_bridge.errors import VLMBridgeError

# torch reads this when it loads: huge pages halve the time of encoding images.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HELP = "Caption images by a small bridge between a frozen vision encoder and language model."
COMMANDS = (
    quickstart, caption, evaluate, compare, report, demo, info, doctor, export, average, features,
    new_decoder, train, weights,
)  # fmt: skip

app = typer.Typer(
    name="vlm-bridge", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False
)
for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"))(command)
app.add_typer(data_app, name="data")


def _print_version(value: bool) -> None:
    if value:
        print(f"vlm-bridge {__version__}")
        raise typer.Exit()


@app.callback()
def _global_options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options before every command (`--debug`, anywhere, shows full tracebacks)."""


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Print bare messages without tokens; a pipe that was closed ends the program."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # logging calls this in its except block


def run_program(command: Callable[[], object], *, logs_to_stdout: bool = False) -> None:
    """Run a Typer app; turn every failure into one line on stderr and the documented exit code."""
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes
    to_stdout = logs_to_stdout and "--json" not in sys.argv  # stdout is then JSON alone
    handler = ConsoleHandler(sys.stdout if to_stdout else sys.stderr)
    logger = logging.getLogger("vlm_bridge")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler if is_first else logging.NullHandler()]
    debug = "--debug" in sys.argv or os.environ.get("VLM_BRIDGE_DEBUG") == "1"
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        command()
    except BrokenPipeError:
        # The reader (head, less) went away: that is not our failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        # Messages of libraries may repeat a request with its token.
        text = traceback.format_exc() if debug else f"error: {_explained(error)}"
        print(redact(text), file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    finally:
        logger.handlers.clear()


def _explained(error: Exception) -> str:
    if isinstance(error, VLMBridgeError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    return (
        f"unexpected {type(error).__name__}: {error} (vlm-bridge doctor checks versions; "
        "run again with --debug for the traceback)"
    )


def run_bridge() -> None:
    """Entry point of ``vlm-bridge``."""
    run_program(app, logs_to_stdout=sys.argv[1:2] in (["train"], ["quickstart"], ["data"]))


def run_data() -> None:
    """Entry point of ``vlm-data``, the same as ``vlm-bridge data``."""
    run_program(data_app, logs_to_stdout=True)


def run_training() -> None:
    """Entry point of ``vlm-training``, the same as ``vlm-bridge train``."""
    training = typer.Typer(pretty_exceptions_enable=False)
    training.command("vlm-training")(train)
    run_program(training, logs_to_stdout=True)
