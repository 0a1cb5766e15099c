"""Quiet libraries."""

from vlm_bridge.cli.options import quiet_transformers, without_garbage_collection

__all__ = ["quiet_transformers", "without_garbage_collection"]
