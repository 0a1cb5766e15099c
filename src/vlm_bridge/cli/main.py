"""The command line. Commands import heavy packages themselves, which keeps --help instant."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from vlm_bridge import __version__
from vlm_bridge.cli.caption import caption, demo
from vlm_bridge.cli.data import app as data_app
from vlm_bridge.cli.evaluate import compare, evaluate, report
from vlm_bridge.cli.finetune import finetune
from vlm_bridge.cli.tools import average, doctor, export, features, info, new_decoder
from vlm_bridge.cli.train import quickstart, train
from vlm_bridge.cli.weights import weights
from vlm_bridge.credentials import redact
from vlm_bridge.errors import VLMBridgeError

# torch reads this when it loads: huge pages halve the time of encoding images.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# GNU OpenMP reads this then. Its threads would spin 300,000 turns for one that waits for a core: 16
# to 48 s for a caption beside one busy program, now 10. To sleep at once costs a tenth when idle.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

HELP = "Caption images by a small bridge between a frozen vision encoder and language model."
COMMANDS = (
    quickstart, caption, finetune, evaluate, compare, report, demo, info, doctor, export, average,
    features, new_decoder, train, weights,
)  # fmt: skip

GLOBAL_FLAGS = {
    "--version": "--version", "--quiet": "--quiet", "-q": "--quiet", "--verbose": "--verbose",
    "-v": "--verbose", "--debug": "--debug",
}  # fmt: skip
EVERYWHERE = "Every command also takes -q/--quiet, -v/--verbose, --debug and --version."
PASS_TO_OVERRIDES = {"ignore_unknown_options": True}  # `--data-dir X` gets a hint there

app = typer.Typer(
    name="vlm-bridge", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False
)
training_app = typer.Typer(name="vlm-training", pretty_exceptions_enable=False)
for command in COMMANDS:
    settings = PASS_TO_OVERRIDES if "overrides" in command.__annotations__ else None
    name = command.__name__.replace("_", "-")
    app.command(name, context_settings=settings, epilog=EVERYWHERE)(command)
training_app.command("vlm-training", context_settings=PASS_TO_OVERRIDES, epilog=EVERYWHERE)(train)
app.add_typer(data_app, name="data")


@app.callback()
@data_app.callback()
def _global_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also debug logs.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Full tracebacks of errors.")] = False,
) -> None:
    """Show these options in the help; `run_program` takes them, from before or after a command."""


class ConsoleHandler(logging.Handler):
    """Print bare messages without tokens, above a progress bar where there is one."""

    def __init__(self, to_stdout: bool):
        super().__init__()
        self.to_stdout = to_stdout

    def emit(self, record: logging.LogRecord) -> None:
        # Looked up each time: a progress bar replaces both streams while it shows.
        stream = sys.stdout if self.to_stdout else sys.stderr
        print(redact(self.format(record)), file=stream, flush=True)


def _take_flags() -> set[str]:
    """Take options that every command has from the command line; return their long names."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    taken = {argument for argument in sys.argv[1:end] if argument in GLOBAL_FLAGS}
    sys.argv[1:end] = [argument for argument in sys.argv[1:end] if argument not in taken]
    return {GLOBAL_FLAGS[argument] for argument in taken}


def run_program(command: Callable[[], object], *, logs_to_stdout: bool = False) -> None:
    """Run a Typer app; turn every failure into one line on stderr and the documented exit code."""
    flags = _take_flags()
    if "--version" in flags:
        print(f"vlm-bridge {__version__}")
        raise SystemExit(0)
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes
    # With --json, stdout is JSON alone.
    handler = ConsoleHandler(to_stdout=logs_to_stdout and "--json" not in sys.argv)
    logger = logging.getLogger("vlm_bridge")
    logger.handlers = [handler if is_first else logging.NullHandler()]
    logger.setLevel(logging.WARNING if "--quiet" in flags or not is_first else logging.INFO)
    if "--verbose" in flags and is_first:
        logger.setLevel(logging.DEBUG)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    debug = "--debug" in flags or os.environ.get("VLM_BRIDGE_DEBUG") == "1"
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
    words = (word for word in sys.argv[1:] if not word.startswith("-"))
    run_program(app, logs_to_stdout=next(words, "") in ("train", "quickstart", "data"))


def run_data() -> None:
    """Entry point of ``vlm-data``, the same as ``vlm-bridge data``."""
    run_program(data_app, logs_to_stdout=True)


def run_training() -> None:
    """Entry point of ``vlm-training``, the same as ``vlm-bridge train``."""
    run_program(training_app, logs_to_stdout=True)
