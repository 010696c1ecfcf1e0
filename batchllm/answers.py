"""From what the executor computed to the answers that are owed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from batchllm.core import Plan, PromptTable, RequestResult, RequestTable, SequenceResult


def answers_of(
    results: Iterable[SequenceResult], plan: Plan, prompts: PromptTable, requests: RequestTable
) -> list[RequestResult]:
    """One result for every request of each finished sequence."""
    return [
        _answer(result, int(request), plan, prompts, requests)
        for result in results
        for request in plan.request[plan.request_ptr[result.sequence] : plan.request_ptr[result.sequence + 1]]
    ]


def faults_of(pending: np.ndarray, prompts: PromptTable, requests: RequestTable) -> list[RequestResult]:
    """Errors for the pending requests [requests, bool] whose row has no usable prompt."""
    if not prompts.faults:
        return []
    faulty = np.isin(requests.row, np.fromiter(prompts.faults, dtype=np.int64, count=len(prompts.faults)))
    return [
        error_of(int(request), prompts.faults[int(requests.row[request])], prompts, requests)
        for request in np.flatnonzero(pending & faulty)
    ]


def error_of(request: int, reason: str, prompts: PromptTable, requests: RequestTable) -> RequestResult:
    """The answer to a request that cannot be answered."""
    return RequestResult(
        request=request,
        output=None,
        output_tokens=(),
        finish_reason="error",
        error=reason,
        prompt_tokens=_prompt_tokens(request, prompts, requests),
        shared_tokens=0,
    )


def _answer(
    result: SequenceResult, request: int, plan: Plan, prompts: PromptTable, requests: RequestTable
) -> RequestResult:
    if result.finish_reason == "error":
        return error_of(request, result.error or "unknown", prompts, requests)
    return RequestResult(
        request=request,
        output=result.text,
        output_tokens=result.tokens,
        finish_reason=result.finish_reason,
        error=None,
        prompt_tokens=_prompt_tokens(request, prompts, requests),
        shared_tokens=int(plan.request_shared[request]),
        logprobs=result.logprobs,
        top_logprobs=result.top_logprobs,
        prompt_logprobs=result.prompt_logprobs,
    )


def _prompt_tokens(request: int, prompts: PromptTable, requests: RequestTable) -> int:
    row = requests.row[request]
    return int(prompts.offsets[row + 1] - prompts.offsets[row])
