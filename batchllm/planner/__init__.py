"""What to compute once, in which order, and how much memory it takes. Pure functions over arrays, never
torch.
"""

from batchllm.planner.plan import PlanOptions, build_plan

__all__ = ["PlanOptions", "build_plan"]
