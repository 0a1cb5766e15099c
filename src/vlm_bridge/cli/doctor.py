"""``vlm-bridge doctor``."""

from __future__ import annotations

import dataclasses
import json
import sys

import typer


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list instead of a table."),
) -> None:
    """Check versions, devices, Java, disk and hub access, and name the command that mends what is missing."""
    from vlm_bridge.doctor import run_checks

    checks = run_checks()
    if as_json:
        print(
            json.dumps(
                [dataclasses.asdict(check) for check in checks], indent=2, ensure_ascii=False
            )
        )
    else:
        from rich.console import Console
        from rich.text import Text

        console = Console(soft_wrap=True, highlight=False)
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        width = max(len(check.name) for check in checks)
        for check in checks:
            line = Text.assemble(
                (f"{check.status:<5}", colours[check.status]), f"{check.name:<{width}}  "
            )
            console.print(line.append(check.detail, "default" if check.status == "ok" else "bold"))
            if check.fix:
                console.print(Text(f"{'':<{width + 7}}mend: {check.fix}", "cyan"))
    failures = [check.name for check in checks if check.status == "fail"]
    if failures:
        print(f"error: required and missing or broken: {', '.join(failures)}", file=sys.stderr)
        raise typer.Exit(1)
