"""`vlm-bridge doctor`."""

from __future__ import annotations

import json
import sys

import typer

from vlm_bridge.cli import options


def doctor(as_json: options.AsJson = False) -> None:
    """Check versions, devices, Java, disk and hub access, and name commands that mend problems."""
    from vlm_bridge.doctor import run_checks

    checks = run_checks()
    if as_json:
        rows = [check._asdict() for check in checks]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        width = max(len(check.name) for check in checks)
        colors = {"ok": "green", "warn": "yellow", "fail": "red"}
        for check in checks:
            status = typer.style(f"{check.status:<5}", colors[check.status])
            typer.echo(f"{status}{check.name:<{width}}  {check.detail}")
            if check.fix:
                typer.echo(f"{'':<{width + 7}}mend: {check.fix}")
    if failures := [check.name for check in checks if check.status == "fail"]:
        print(f"error: required and missing or broken: {', '.join(failures)}", file=sys.stderr)
        raise typer.Exit(1)
