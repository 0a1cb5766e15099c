"""Log messages of the package, as a test reads them."""

from __future__ import annotations

import logging


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]):
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def log_lines() -> list[str]:
    """Return a list that grows with every message."""
    lines: list[str] = []
    logger = logging.getLogger("vlm_bridge")
    logger.addHandler(_Lines(lines))
    logger.setLevel(logging.INFO)
    return lines
