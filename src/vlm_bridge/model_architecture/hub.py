"""The hub's refusals, under the name that the rooms of the models import: `vlm_bridge.hub` has them."""

from vlm_bridge.hub import SITE, hub_problem, reach_hub

__all__ = ["SITE", "hub_problem", "reach_hub"]
