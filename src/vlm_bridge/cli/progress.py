"""Progress on stderr."""

from vlm_bridge.cli.options import note, show_progress

__all__ = ["note", "show_progress"]
