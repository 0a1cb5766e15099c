"""Names of `files` and `version`, for callers that do not import these yet."""

from vlm_bridge.files import cache_dir as cache_dir
from vlm_bridge.version import environment as environment
