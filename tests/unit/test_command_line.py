"""Options that all programs share, and hints for mistyped ones."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import pytest

from vlm_bridge import __version__
from vlm_bridge.cli import main, options

PROGRAMS = [main.run_bridge, main.run_data, main.run_training]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("arguments", [["--version"], ["-q", "--version"]])
def test_every_program_has_a_version(
    program: Callable[[], None],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as exit_:
        program()
    assert (exit_.value.code, capsys.readouterr().out) == (0, f"vlm-bridge {__version__}\n")


@pytest.mark.parametrize(
    ("flag", "on_stdout", "on_stderr"),
    [
        ("", ["info", "warning"], ["note", "working: 2 of 2", "failed"]),
        ("-q", ["warning"], ["failed"]),
        ("--verbose", ["debug", "info", "warning"], ["note", "working: 2 of 2", "failed"]),
    ],
)
def test_quiet_and_verbose(
    flag: str,
    on_stdout: list[str],
    on_stderr: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command() -> None:
        assert sys.argv == ["program", "work", "--", "-q"]
        for level in ("debug", "info", "warning"):
            getattr(logging.getLogger("vlm_bridge.test"), level)(level)
        options.note("note")
        with options.show_progress("working") as report:
            report(2, 2)
        options.note("failed", always=True)

    for arguments in ([flag, "work"], ["work", flag]):
        given = ["program", *filter(None, arguments), "--", "-q"]
        monkeypatch.setattr(sys, "argv", given)
        main.run_program(command, logs_to_stdout=True)
        printed = capsys.readouterr()
        assert [line.split()[-1] for line in printed.out.splitlines()] == on_stdout
        assert printed.err.splitlines() == on_stderr


def test_help_of_transform_only_names_options_of_single_sources(run_here) -> None:
    listed, named = run_here("data", "transform", "--help").stdout.rsplit("Some sources", 1)
    assert "--image-size" in listed
    for option in ("--year", "restval", "--num-train", "--wordings", "--keep-tags", "--split "):
        assert option not in listed and option in named, option


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("train --data-dir X", "no such option: --data-dir; did you mean data_dir=X?"),
        (
            "train --bridge.num-heads=4 seed=1",
            "--bridge.num-heads; did you mean bridge.num_heads=4?",
        ),
        ("train --resum auto", "--resum; did you mean --resume?"),
        ("info --num_beams --json", "--num_beams; did you mean decode.num_beams=VALUE?"),
        ("features --output-dir runs/x", "--output-dir; did you mean output_dir=runs/x?"),
        ("quickstart --max-steps 3", "--max-steps; did you mean max_steps=3?"),
        ("train -x", "no such option: -x (see --help)"),
    ],
)
def test_a_recipe_key_given_as_an_option_is_explained(arguments: str, hint: str, run_here) -> None:
    done = run_here(*arguments.split())
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert hint in done.stderr and done.stderr.count("\n") == 1
