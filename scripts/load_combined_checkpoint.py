"""Load a combined file (PVT + projection + BLIP's text decoder) as transformers' modules.

from scripts.load_combined_checkpoint import load_combined_model
pvt, blip, proj = load_combined_model("checkpoints/blip_pvt_combined.pth")
"""

from __future__ import annotations

from vlm_bridge.combined_files import load_combined_model

__all__ = ["load_combined_model"]
