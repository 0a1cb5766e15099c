"""The names of `device`, for callers that do not import it yet."""

import shutil as shutil

from vlm_bridge.device import LAUNCHED as LAUNCHED
from vlm_bridge.device import DeviceCopy as DeviceCopy
from vlm_bridge.device import autocast as autocast
from vlm_bridge.device import cpu_has_bfloat16 as cpu_has_bfloat16
from vlm_bridge.device import missing_compiler as missing_compiler
from vlm_bridge.device import peak_rss_gib as peak_rss_gib
from vlm_bridge.device import process_rank as process_rank
from vlm_bridge.device import resolve_device as resolve_device
from vlm_bridge.device import return_freed_memory as return_freed_memory
from vlm_bridge.device import set_threads as set_threads
from vlm_bridge.device import usable_cores as usable_cores
