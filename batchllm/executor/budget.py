"""How many tokens of KV the engine may hold, and how large a step is."""

from __future__ import annotations

import numpy as np

from batchllm.core import Plan, PromptTable, RequestTable
from batchllm.errors import JobError
from batchllm.executor.device_memory import activation_bytes, free_bytes, kv_bytes
from batchllm.executor.engine import EngineOptions
from batchllm.executor.model import ModelRunner
from batchllm.planner.auto_values import cpu_kv_bytes, step_tokens
from batchllm.planner.output_limits import output_limits

_LEAF_SLACK = 32  # slots a sequence may hold beyond its tokens, from rounding
_PAGE = 64  # slots, at most, that a node's last page leaves empty on a GPU


def kv_token_budget(
    model: ModelRunner, kv_memory: int | str, max_step_tokens: int | str = "auto", free: int | None = None
) -> int:
    """Tokens that the budget holds; `free`: bytes of the model's device, asked for if None.

    Raises JobError when it holds none.
    """
    if not isinstance(kv_memory, int):
        model.backend.release_kept()  # what an earlier run keeps would count as used, and the budget shrink
    free = free_bytes(model.device) if free is None else free
    if model.placement.gpu is None:
        budget = cpu_kv_bytes(kv_memory, free)
    else:
        step = step_tokens(max_step_tokens, gpu=True)
        rows = min(step, EngineOptions(0, step).max_running)
        most = kv_bytes(free, activation_bytes(model.text_config, model.dtype, step, rows))
        budget = min(kv_memory, most) if isinstance(kv_memory, int) else most
    each = model.backend.bytes_per_token(model.layers, model.dtype)
    if budget < each:
        raise JobError(_no_room(kv_memory, budget, each, model.placement.gpu is not None))
    return budget // each


def _no_room(kv_memory: int | str, budget: int, each: int, on_gpu: bool) -> str:
    if isinstance(kv_memory, int) and kv_memory < each:
        return (
            f"engine.kv_memory: {kv_memory} bytes do not hold one token of this model "
            f"({each:,} bytes each); raise it."
        )
    remedy = (
        "lower engine.max_step_tokens or set engine.device to cpu" if on_gpu else "raise engine.kv_memory"
    )
    return (
        f"engine.kv_memory: the {budget:,} bytes that are free for KV do not hold one token of this model "
        f"({each:,} bytes each); {remedy}."
    )


def too_long(
    prompts: PromptTable, requests: RequestTable, pending: np.ndarray, kv_tokens: int
) -> tuple[np.ndarray, str]:
    """Pending requests [bool] whose prompt and first output token cannot fit in KV memory, and what to tell them."""
    lengths = np.diff(prompts.offsets)[requests.row]
    reason = f"the prompt does not fit in KV memory, which holds {kv_tokens:,} tokens; raise engine.kv_memory"
    return pending & (lengths > kv_tokens), reason


def engine_options(
    plan: Plan,
    prompts: PromptTable,
    kv_tokens: int,
    max_step_tokens: int | str,
    *,
    gpu: bool = False,
    max_length: int | None = None,
) -> EngineOptions:
    """The pool is never larger than the whole job could fill. `max_length`: of a sequence, prompt and output."""
    prompt_length = plan.node_end[plan.sequence_node]
    outputs = output_limits(prompts, plan.sequence_params, prompt_length, max_length)
    slack = _LEAF_SLACK + (_PAGE if gpu else 0)
    needed = int((plan.node_end - plan.node_start).sum(dtype=np.int64) + (outputs + slack).sum())
    needed += _PAGE * plan.num_nodes if gpu else 0
    return EngineOptions(
        kv_tokens=min(kv_tokens, needed),
        max_step_tokens=step_tokens(max_step_tokens, gpu=gpu),
        max_length=max_length,
    )
