"""The names of `credentials`, for callers that do not import it yet."""

from vlm_bridge.credentials import SITE as SITE
from vlm_bridge.credentials import hub_problem as hub_problem
from vlm_bridge.credentials import reach_hub as reach_hub
