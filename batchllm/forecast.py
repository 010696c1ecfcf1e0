"""What a run will come to, before it runs: the plan simulated and put through the cost model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from batchllm.core import Plan, PromptTable
from batchllm.planner.cost import step_costs
from batchllm.planner.hardware import BYTES_PER_VALUE, DeviceProfile, cpu_profile
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.model_shape import ModelShape, model_shape
from batchllm.planner.simulate import Simulation, SimulationOptions, simulate

if TYPE_CHECKING:
    from batchllm.executor.engine import EngineOptions
    from batchllm.executor.model import ModelRunner

MEASURED_FROM_SECONDS = 20.0  # a shorter run is not worth the seconds a calibration takes


@dataclass(frozen=True)
class Forecast:
    """Under the names that metrics.json has for what is measured."""

    seconds: float  # of the stage "run"
    steps: int
    kv_peak_bytes: int
    prompt_tokens_computed: int
    output_tokens: int
    mean_output_tokens: float  # of a sequence
    calibrated: bool  # on this device with this model; else seconds are from a general profile

    def figures(self) -> dict[str, float]:
        """For metrics.json."""
        return asdict(self)


def simulate_plan(
    plan: Plan, prompts: PromptTable, estimator: LengthEstimator, options: SimulationOptions
) -> tuple[Simulation, int]:
    """The steps of a run whose outputs are all as long as is expected, and how many tokens those are."""
    limits = np.array([params.max_tokens for params in prompts.params], dtype=np.int64)[plan.sequence_params]
    outputs = estimator.mean_total(plan.sequence_params, limits)
    return simulate(plan, outputs, options), int(outputs.sum())


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
        seconds=costs.total_seconds,
        steps=simulation.steps,
        kv_peak_bytes=simulation.peak_kv_tokens * shape.kv_bytes_per_token(size),
        prompt_tokens_computed=simulation.prompt_tokens,
        output_tokens=output_tokens,
        mean_output_tokens=output_tokens / max(1, sequences),
        calibrated=profile.calibrated,
    )


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

    memory = SimulationOptions(options.kv_tokens, options.max_step_tokens, options.max_running)
    simulation, outputs = simulate_plan(plan, prompts, estimator, memory)
    shape, dtype = model_shape(model.text_config), str(model.dtype).removeprefix("torch.")

    def with_profile(profile: DeviceProfile) -> Forecast:
        return forecast(simulation, outputs, plan.num_sequences, shape, profile, dtype)

    rough = with_profile(cpu_profile(dtype, torch.get_num_threads()))
    params = prompts.params[int(np.bincount(plan.sequence_params).argmax())]
    worth_it = rough.seconds >= MEASURED_FROM_SECONDS
    profile = calibrated_profile(model, fingerprint, params, may_measure=worth_it)
    return with_profile(profile) if profile else rough
