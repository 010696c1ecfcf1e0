"""That what is timed is right: greedy tokens of a tiny float32 model, decode steps that are recorded as graphs, and the
error of logits in the model's dtype.

python -m benchmarks.gpu.checks     the first two, in seconds
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchllm_kernels.reference_set import TorchKernels

from batchllm.core import SamplingParams
from batchllm.executor.device import Placement, choose_device, this_machine
from batchllm.executor.engine import EngineOptions
from batchllm.executor.engines import engine_for
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.paged_backend import PagedBackend
from batchllm.executor.parity import _random_sequences, _run_flat
from batchllm.executor.stopping import StopRules
from batchllm.planner.plan import PlanOptions, build_plan
from benchmarks.gpu.jobs import _tables, run_ours
from benchmarks.gpu.models import make_model
from benchmarks.gpu.workloads import Workload, workloads

_CPU = torch.device("cpu")


def greedy_tokens_equal(placement: Placement) -> bool:
    """The engine on this device against the one for CPUs, on a tiny float32 model with clear choices."""
    made = make_model("tiny", _CPU, torch.float32)
    for parameter in made.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(8.0)
    weights = made.state_dict()
    found = []
    for where in (Placement(), placement):
        model = make_model("tiny", where.device, torch.float32)
        model.load_state_dict(weights)
        found.append(_tokens(_runner(model, where)))
    return bool(found[0] == found[1])


def _runner(model: Any, where: Placement) -> ModelRunner:
    runner = prepare_model(model, placement=where)
    if where.gpu is not None and where.device.type == "cpu":
        runner.backend = PagedBackend(where.device, 16, TorchKernels())
    runner.fuse()
    return runner


def recorded_steps(placement: Placement, max_tokens: int) -> dict[str, Any]:
    """What became of the decode steps of eight rows. With more than 512 tokens of its own each, a row's pages outgrow
    what a graph was made for several times, so several must be recorded, one after another in the same memory.

    Raises RuntimeError where they are not.
    """
    runner = _runner(make_model("tiny", placement.device, torch.bfloat16), placement)
    prompts = [[(7 * row + index) % 256 for index in range(64)] for row in range(8)]
    found = run_ours(runner, Workload("eight rows", prompts, max_tokens))
    steps = {name: found[f"decode_{name}"] for name in ("recorded", "replayed", "launched", "not_recorded")}
    if placement.device.type == "cuda" and steps["recorded"] < 2:
        raise RuntimeError(f"decode steps are not recorded as graphs: {steps}")
    return steps


def _tokens(runner: ModelRunner) -> dict[int, tuple[int, ...]]:
    prompts, requests = _tables(workloads(256, tiny=True)["three levels"])
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = type(prompts)(prompts.tokens, prompts.offsets, (params,), prompts.params_of, {})
    plan = build_plan(prompts, requests, np.ones(len(requests), dtype=bool), PlanOptions(min_shared_tokens=8))
    options = EngineOptions(kv_tokens=8192, max_step_tokens=256)
    engine = engine_for(runner, plan, prompts, requests, StopRules(frozenset(), None), options)
    return {result.sequence: result.tokens for done in engine.run() for result in done}


def logit_errors(runner: ModelRunner, fused: bool) -> dict[str, Any]:
    """Of our steps and of torch's attention, both in the model's dtype, against the latter in float32.

    `fused`: of our own forward pass, which is timed where the model has one.
    """
    sequences = _random_sequences(int(runner.text_config.vocab_size))
    own_forward = fused and runner.fuse()
    ours = torch.cat(_run_flat(runner, sequences))
    runner.unfuse()
    runner.model.set_attn_implementation("sdpa")
    theirs = torch.cat(_alone(runner, sequences))
    dtype = runner.dtype
    runner.model.float()
    exact = torch.cat(_alone(runner, sequences))
    runner.model.to(dtype)
    runner.model.set_attn_implementation("batchllm")
    scale = exact.abs().max()
    return {
        "own_forward": own_forward,
        "ours": float((ours - exact).abs().mean() / scale),
        "torch": float((theirs - exact).abs().mean() / scale),
    }


@torch.inference_mode()
def _alone(runner: ModelRunner, sequences: list[np.ndarray]) -> list[torch.Tensor]:
    return [
        runner.model(input_ids=torch.from_numpy(tokens).unsqueeze(0).to(runner.device), use_cache=False)
        .logits[0]
        .float()
        for tokens in sequences
    ]


def main() -> None:
    placement = choose_device("cuda", 0, this_machine())
    print("greedy tokens equal the CPU's:", greedy_tokens_equal(placement))
    print("decode steps:", recorded_steps(placement, 640))


if __name__ == "__main__":
    main()
