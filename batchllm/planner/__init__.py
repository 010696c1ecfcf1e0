"""What to compute once, in which order, and how much memory it takes. Pure functions, no torch."""

from batchllm.planner.groups import Groups, SharingLevels, sharing_levels, top_groups
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.memory import FOREVER, fits, how_many_fit, peak_tokens
from batchllm.planner.plan import PlanOptions, build_plan

__all__ = [
    "FOREVER",
    "Groups",
    "LengthEstimator",
    "PlanOptions",
    "SharingLevels",
    "build_plan",
    "fits",
    "how_many_fit",
    "peak_tokens",
    "sharing_levels",
    "top_groups",
]
