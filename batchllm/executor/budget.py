"""How many tokens of KV the engine may hold, and how large a step is."""

from __future__ import annotations

import numpy as np
import psutil

from batchllm.core import Plan, PromptTable, RequestTable
from batchllm.errors import JobError
from batchllm.executor.engine import EngineOptions
from batchllm.executor.kv_pool import bytes_per_token
from batchllm.executor.model import ModelRunner
from batchllm.planner.auto_values import cpu_kv_bytes, step_tokens

_LEAF_SLACK = 32  # slots a sequence may hold beyond its tokens, from rounding


def kv_token_budget(model: ModelRunner, kv_memory: int | str) -> int:
    """Tokens that the budget holds. Raises JobError when it holds none."""
    budget = cpu_kv_bytes(kv_memory, psutil.virtual_memory().available)
    tokens = budget // bytes_per_token(model.layers, model.dtype)
    if tokens < 1:
        raise JobError(
            f"engine.kv_memory: {kv_memory} bytes do not hold one token of this model "
            f"({bytes_per_token(model.layers, model.dtype):,} bytes each); raise it."
        )
    return tokens


def too_long(
    prompts: PromptTable, requests: RequestTable, pending: np.ndarray, kv_tokens: int
) -> tuple[np.ndarray, str]:
    """Pending requests [bool] whose prompt and first output token cannot fit in KV memory, and what to tell them."""
    lengths = np.diff(prompts.offsets)[requests.row]
    reason = f"the prompt does not fit in KV memory, which holds {kv_tokens:,} tokens; raise engine.kv_memory"
    return pending & (lengths > kv_tokens), reason


def engine_options(
    plan: Plan, prompts: PromptTable, kv_tokens: int, max_step_tokens: int | str
) -> EngineOptions:
    """The pool is never larger than the whole job could fill."""
    outputs = np.array([params.max_tokens for params in prompts.params], dtype=np.int64)[plan.sequence_params]
    needed = int((plan.node_end - plan.node_start).sum(dtype=np.int64) + (outputs + _LEAF_SLACK).sum())
    return EngineOptions(kv_tokens=min(kv_tokens, needed), max_step_tokens=step_tokens(max_step_tokens))
