"""`vlm-bridge quickstart`."""

from __future__ import annotations


def quickstart() -> None:
    """placeholder"""
