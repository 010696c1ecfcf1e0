"""The engine for the device that a model is on and for what its rows ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from batchllm.core import Plan, PromptTable, SamplingParams
from batchllm.executor.engine import Engine
from batchllm.executor.model import ModelRunner
from batchllm.planner.score_reads import plan_score_reads


def engine_for(
    model: ModelRunner, plan: Plan, prompts: PromptTable, *arguments: Any, **options: Any
) -> Engine:
    """Arguments are those of `Engine`.

    On a GPU, the engine that schedules ahead; but where the host has to see each token before the next one is chosen
    (structured output, penalties, ...), rows are scored or stored KV is put in, the plain one, with the GPU's kernels.
    """
    if options.get("score_reads") is None and any(one.prompt_logprobs is not None for one in prompts.params):
        options["score_reads"] = plan_score_reads(plan, prompts, arguments[0])
    plain = options.get("score_reads") is None and options.get("stored") is None
    plain = plain and all(_is_plain(params) for params in prompts.params)
    if model.placement.gpu is None or not plain:
        return Engine(model, plan, prompts, *arguments, **options)
    from batchllm.executor.device_engine import DeviceEngine  # needs triton

    return DeviceEngine(model, plan, prompts, *arguments, **options)


def _is_plain(params: SamplingParams) -> bool:
    """Whether tokens are chosen by what the device's sampler knows; ends may be seen late."""
    default = SamplingParams()
    known = "max_tokens temperature top_p top_k min_p n seed stop stop_token_ids ignore_eos logprobs best_of"
    known += " include_stop skip_special_tokens"
    return replace(params, **{name: getattr(default, name) for name in known.split()}) == default
