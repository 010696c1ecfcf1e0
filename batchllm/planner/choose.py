"""Which order is best for the job at hand: each is simulated, and the one predicted to end first is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from batchllm.core import IntArray, Plan
from batchllm.planner.loads import FloatArray, StepLoads
from batchllm.planner.ordering import OrderName
from batchllm.planner.plan import PlanDraft, arrange
from batchllm.planner.sample import part_of, spread_blocks
from batchllm.planner.simulate import Simulation, SimulationOptions, simulate

# In the order of preference where the prediction is the same.
POLICIES: tuple[OrderName, ...] = ("decode_ratio", "dual_scan", "longest_first", "tree", "input")
MOST_SIMULATED = 50_000  # sequences; of a larger job a part is simulated
_MOST_PATHS = 5_000_000  # nodes on the paths to all sequences simulated, at most

Cost = Callable[[StepLoads], FloatArray]  # [entries] seconds of one step of each entry


@dataclass(frozen=True)
class Prediction:
    """What one order comes to, in the part of the job that was simulated."""

    seconds: float
    steps: int
    peak_kv_tokens: int
    prompt_tokens: int  # computed


@dataclass(frozen=True)
class OrderChoice:
    order: OrderName
    plan: Plan
    reason: str  # one sentence
    predictions: Mapping[OrderName, Prediction]
    simulated: int  # sequences simulated, evenly spread over the job; all if it is small enough


def choose_order(
    draft: PlanDraft,
    cost: Cost,
    options: SimulationOptions,
    outputs: Callable[[Plan], IntArray] | None = None,
    policies: tuple[OrderName, ...] = POLICIES,
    most_simulated: int = MOST_SIMULATED,
) -> OrderChoice:
    """By its own prediction the chosen order is never worse than any of the others, tree order among them.

    `outputs`: expected output tokens of each sequence of a plan. Default: what the draft was made with.
    """
    outputs = outputs or draft.expected_decode
    sampled = _sample(draft, most_simulated)
    best: tuple[OrderName, Plan] | None = None
    predictions: dict[OrderName, Prediction] = {}
    for policy in policies:
        plan = arrange(draft, policy)
        keep = sampled[plan.request[plan.request_ptr[:-1]]]
        part = plan if keep.all() else part_of(plan, keep)
        predictions[policy] = predict(simulate(part, outputs(plan)[keep], options), cost)
        if best is None or predictions[policy].seconds < predictions[best[0]].seconds:
            best = policy, plan
    if best is None:
        raise ValueError("no order to choose from")
    simulated = int(sampled.sum())
    reason = _reason(best[0], predictions, simulated, len(draft.sequences))
    return OrderChoice(best[0], best[1], reason, predictions, simulated)


def predict(simulation: Simulation, cost: Cost) -> Prediction:
    loads = simulation.loads
    return Prediction(
        seconds=float((loads.steps * cost(loads)).sum()),
        steps=simulation.steps,
        peak_kv_tokens=simulation.peak_kv_tokens,
        prompt_tokens=simulation.prompt_tokens,
    )


def _sample(draft: PlanDraft, most: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """[requests of the RequestTable] those that name a sequence to simulate."""
    first = draft.sequences.first_request
    sampled = np.zeros(len(draft.requests), dtype=np.bool_)
    most = max(1, min(most, _MOST_PATHS // max(1, draft.kept.depth)))
    sampled[first] = True if len(first) <= most else spread_blocks(len(first), most)
    return sampled


def _reason(order: OrderName, of: Mapping[OrderName, Prediction], simulated: int, sequences: int) -> str:
    best, worst = of[order], max(of, key=lambda policy: of[policy].seconds)
    on = "" if simulated == sequences else f" (simulated on {simulated:,} of {sequences:,} sequences)"
    if of[worst].seconds <= 1.001 * best.seconds:
        return f"{order}: every order is predicted to take about {best.seconds:,.1f} s{on}."
    against = "tree" if "tree" in of and order != "tree" else worst
    saved = 1.0 - best.seconds / max(of[against].seconds, 1e-12)
    why = f"{best.steps:,} steps instead of {of[against].steps:,}"
    if best.prompt_tokens < of[against].prompt_tokens:
        why += f", {of[against].prompt_tokens - best.prompt_tokens:,} fewer prompt tokens computed again"
    return f"{order}: {best.seconds:,.1f} s predicted, {saved:.1%} less than {against} order, in {why}{on}."
