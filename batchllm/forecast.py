"""What a run will come to, before it runs: the plan simulated and put through the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, Plan, PromptTable
from batchllm.job import JobSpec
from batchllm.planner.choose import choose_order
from batchllm.planner.cost import step_costs
from batchllm.planner.hardware import BYTES_PER_VALUE, DeviceProfile, cpu_profile, gpu_profile
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.model_shape import ModelShape, model_shape
from batchllm.planner.ordering import OrderName
from batchllm.planner.output_limits import output_limits
from batchllm.planner.plan import PlanDraft, PlanOptions, arrange
from batchllm.planner.simulate import Simulation, SimulationOptions, simulate

if TYPE_CHECKING:
    from batchllm.executor.engine import EngineOptions
    from batchllm.executor.model import ModelRunner

MEASURED_FROM_SECONDS = 20.0  # a shorter run is not worth the seconds a calibration takes


@dataclass(frozen=True)
class Forecast:
    """Under the names that metrics.json has for what is measured."""

    sequences: int
    seconds: float  # of the stage "run"
    steps: int
    kv_peak_bytes: int
    prompt_tokens_computed: int
    output_tokens: int
    calibrated: bool  # on this device with this model; else seconds are from a general profile

    @property
    def mean_output_tokens(self) -> float:
        """Of a sequence."""
        return self.output_tokens / max(1, self.sequences)

    def then(self, later: Forecast) -> Forecast:
        """Both, one after the other."""
        return Forecast(
            sequences=self.sequences + later.sequences,
            seconds=self.seconds + later.seconds,
            steps=self.steps + later.steps,
            kv_peak_bytes=max(self.kv_peak_bytes, later.kv_peak_bytes),
            prompt_tokens_computed=self.prompt_tokens_computed + later.prompt_tokens_computed,
            output_tokens=self.output_tokens + later.output_tokens,
            calibrated=self.calibrated and later.calibrated,
        )

    def beside(self, other: Forecast) -> Forecast:
        """Both at the same time, on devices of their own."""
        together = self.then(other)
        return replace(together, seconds=max(self.seconds, other.seconds))

    def figures(self) -> dict[str, float]:
        """For metrics.json."""
        return {**asdict(self), "mean_output_tokens": self.mean_output_tokens}


def simulate_plan(
    plan: Plan, prompts: PromptTable, estimator: LengthEstimator, options: SimulationOptions
) -> tuple[Simulation, int]:
    """The steps of a run whose outputs are all as long as is expected, and how many tokens those are."""
    outputs = expected_outputs(plan, prompts, estimator, options.max_length)
    return simulate(plan, outputs, options), int(outputs.sum())


def expected_outputs(
    plan: Plan, prompts: PromptTable, estimator: LengthEstimator, max_length: int | None
) -> IntArray:
    """[sequences] tokens. `max_length`: of the model."""
    prompt_length = plan.node_end[plan.sequence_node]
    limits = output_limits(prompts, plan.sequence_params, prompt_length, max_length)
    return estimator.mean_total(plan.sequence_params, limits, plan.sequence_group)


def combined_figures(forecasts: Sequence[Forecast | None]) -> dict[str, float]:
    """For metrics.json: of plans that are run one after another. Nothing if one of them could not be foreseen."""
    known = [forecast for forecast in forecasts if forecast is not None]
    return reduce(Forecast.then, known).figures() if known and len(known) == len(forecasts) else {}


def plan_options(
    job: JobSpec, max_length: int | None, row_group: NDArray[np.int32] | None = None
) -> PlanOptions:
    """How a job is planned, by a run and by `batchllm plan` alike. `max_length`: of the model."""
    shortest = job.engine.min_shared_tokens
    return PlanOptions(
        min_shared_tokens=shortest if isinstance(shortest, int) else PlanOptions.min_shared_tokens,
        row_group=row_group,
        max_length=max_length,
    )


def ordered_plan(
    draft: PlanDraft,
    order: OrderName,
    shape: ModelShape,
    profile: DeviceProfile,
    dtype: str,
    options: SimulationOptions,
) -> tuple[Plan, str]:
    """The plan in this order, for `auto` in the one that is predicted to end first; and a sentence that says why."""
    if order != "auto":
        return arrange(draft, order), f"{order}: as engine.order says."
    if len(draft.sequences) == 0:
        return arrange(draft, "tree"), "tree: there is nothing to put in order."
    size = BYTES_PER_VALUE[dtype]
    choice = choose_order(draft, lambda loads: step_costs(shape, profile, loads, size).seconds, options)
    return choice.plan, choice.reason


def forecast(
    simulation: Simulation,
    output_tokens: int,
    sequences: int,
    shape: ModelShape,
    profile: DeviceProfile,
    dtype: str,
) -> Forecast:
    """`dtype` names what weights and KV are stored in."""
    size = BYTES_PER_VALUE[dtype]
    costs = step_costs(shape, profile, simulation.loads, size)
    return Forecast(
        sequences=sequences,
        seconds=costs.total_seconds,
        steps=simulation.steps,
        kv_peak_bytes=simulation.peak_kv_tokens * shape.kv_bytes_per_token(size),
        prompt_tokens_computed=simulation.prompt_tokens,
        output_tokens=output_tokens,
        calibrated=profile.calibrated,
    )


def plan_for_model(
    model: ModelRunner, fingerprint: str, draft: PlanDraft, order: OrderName, options: SimulationOptions
) -> tuple[Plan, str]:
    """`ordered_plan` for the model in memory. Nothing is measured for it: orders are compared with each other only."""
    dtype = str(model.dtype).removeprefix("torch.")
    gpu = model.placement.gpu
    profile = gpu_profile(gpu.name, dtype) if gpu else this_device(fingerprint, dtype, draft.prompts)
    return ordered_plan(draft, order, model_shape(model.text_config), profile, dtype, options)


def this_device(fingerprint: str, dtype: str, prompts: PromptTable) -> DeviceProfile:
    """As measured in an earlier run of this model, else in general."""
    import torch

    from batchllm.executor.profile_cache import stored_profile

    stored = stored_profile(fingerprint, dtype, prompts.params[0])
    return stored or cpu_profile(dtype, torch.get_num_threads())


def forecast_run(
    model: ModelRunner,
    fingerprint: str,
    plan: Plan,
    prompts: PromptTable,
    estimator: LengthEstimator,
    options: EngineOptions,
) -> Forecast:
    """For the model in memory on this device, which is measured if that is worth it and has not been done before."""
    import torch

    from batchllm.executor.profile_cache import calibrated_profile

    memory = SimulationOptions(
        options.kv_tokens, options.max_step_tokens, options.max_running, model.max_length
    )
    simulation, outputs = simulate_plan(plan, prompts, estimator, memory)
    shape, dtype = model_shape(model.text_config), str(model.dtype).removeprefix("torch.")

    def with_profile(profile: DeviceProfile) -> Forecast:
        return forecast(simulation, outputs, plan.num_sequences, shape, profile, dtype)

    if model.placement.gpu:
        return with_profile(gpu_profile(model.placement.gpu.name, dtype))
    rough = with_profile(cpu_profile(dtype, torch.get_num_threads()))
    worth_it = rough.seconds >= MEASURED_FROM_SECONDS
    profile = calibrated_profile(model, fingerprint, prompts.params[0], may_measure=worth_it)
    return with_profile(profile) if profile else rough
