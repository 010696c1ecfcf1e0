"""The model of a job: what can be said of it before it is loaded, and its loading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from batchllm.core import PromptTable, RequestTable
from batchllm.dataset.claim import Claim
from batchllm.dataset.resume import answered_before
from batchllm.executor.model_folder import check_model_folder
from batchllm.job import JobSpec
from batchllm.report.stopwatch import Stopwatch

if TYPE_CHECKING:
    from batchllm.executor.device import Placement
    from batchllm.executor.gate import LengthLimit
    from batchllm.executor.model import ModelRunner


class LoadedModel(NamedTuple):
    model: ModelRunner
    kv_tokens: int  # that its KV memory holds


def check_model(job: JobSpec) -> tuple[Any, LengthLimit | None, Placement]:
    """Its configuration, up to what length it is exact, and where it will run. Raises what loading it would, if that
    can be seen without its weights."""
    from batchllm.executor.device import choose_device, this_machine
    from batchllm.executor.model_config import load_config, weight_bytes

    check_model_folder(job.model.path, job.model.trust_remote_code)
    if job.model.quantize:
        from batchllm.executor.quantize import check_quantization

        check_quantization(job.model.quantize)
    config, limit = load_config(job.model.path, job.model.trust_remote_code)
    size = weight_bytes(config, job.model.dtype)
    placement = choose_device(job.engine.device, size, this_machine(), job.model.quantize)
    return config, limit, placement


def load_before_opening(
    job: JobSpec,
    prompts: PromptTable,
    requests: RequestTable,
    claim: Claim,
    watch: Stopwatch,
    placement: Placement,
) -> LoadedModel | None:
    """The model, if there are prompts to answer. None where every answer is in the folder already.

    When it turns out not to run, the folder must be as it was: nothing left in a new one, no answers set aside or
    removed in another. So it is loaded before the folder is opened.
    """
    faulty = np.isin(requests.row, np.fromiter(prompts.faults, dtype=np.int64, count=len(prompts.faults)))
    answered = faulty if claim.replaces else faulty | answered_before(claim.folder, requests)
    return None if answered.all() else load_checked_model(job, watch, placement)


def load_checked_model(job: JobSpec, watch: Stopwatch, placement: Placement) -> LoadedModel:
    """The model, checked, and the tokens that its KV memory holds."""
    from batchllm.executor.budget import kv_token_budget
    from batchllm.executor.ready_model import load_ready_model

    chosen = job.model
    with watch.time("load"):
        model = load_ready_model(
            chosen.path, chosen.dtype, chosen.trust_remote_code, placement, chosen.quantize
        )
    return LoadedModel(model, kv_token_budget(model, job.engine.kv_memory, job.engine.max_step_tokens))
