"""Lossy reuse, measured: a sample of a job's answers is also computed in full, and both are compared.

With `chunks.target_quality` the sample is answered before the others, in full and then with more and more tokens
computed again, until enough of its answers are those of the full computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.answers import answers_of
from batchllm.chunk_reuse import ChunkReuse
from batchllm.chunkcache.answer_quality import Answer, AnswerQuality, compare_answers
from batchllm.chunkcache.stored_chunks import StoredChunks
from batchllm.core import Plan, PromptTable, RequestResult, RequestTable
from batchllm.executor.model import ModelRunner
from batchllm.forecast import plan_options
from batchllm.job import ChunksSpec, JobSpec
from batchllm.planner.plan import build_plan

LEAST_SAMPLE = 50
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # tried for a target, the smallest first
_SEED = 20_260  # of the choice of the sample: the same in every run of a job


@dataclass
class ReuseSample:
    """The requests answered both ways, and their answers by request."""

    chosen: NDArray[np.bool_]  # [requests]
    full: dict[int, Answer] = field(default_factory=dict)
    found: dict[int, Answer] = field(default_factory=dict)
    tried: list[tuple[float, AnswerQuality]] = field(default_factory=list)  # (share, quality) for a target

    def see(self, answers: Iterable[RequestResult]) -> None:
        """Keeps those answers of the run that belong to the sample."""
        self.found |= {answer.request: _kept(answer) for answer in answers if self.chosen[answer.request]}

    def quality(self) -> AnswerQuality:
        both = sorted(self.full.keys() & self.found.keys())
        return compare_answers([self.full[n] for n in both], [self.found[n] for n in both])


class SampleRunner:
    """Answers chosen requests of a job with or without stored chunks. Nothing is written."""

    def __init__(
        self,
        job: JobSpec,
        model: ModelRunner,
        kv_tokens: int,
        tokenizer: Any,
        prompts: PromptTable,
        requests: RequestTable,
    ):
        self.job, self.model, self.kv_tokens = job, model, kv_tokens
        self.tokenizer, self.prompts, self.requests = tokenizer, prompts, requests
        self.computed_tokens = 0

    def answer(self, chosen: NDArray[np.bool_], reuse: ChunkReuse | None) -> dict[int, Answer]:
        """By request. `reuse` None: computed in full."""
        from batchllm.executor.budget import engine_options
        from batchllm.executor.engine import Engine
        from batchllm.executor.stopping import StopRules, end_of_sequence_ids

        plan = build_plan(self.prompts, self.requests, chosen, plan_options(self.job, self.model.max_length))
        if not plan.num_sequences:
            return {}
        end = end_of_sequence_ids(self.model.model.generation_config, self.tokenizer)
        options = engine_options(plan, self.prompts, self.kv_tokens, self.job.engine.max_step_tokens)
        answers: dict[int, Answer] = {}
        with stored_chunks_for(reuse, plan) as stored:
            rules = StopRules(end, self.tokenizer)
            engine = Engine(self.model, plan, self.prompts, self.requests, rules, options, stored=stored)
            for finished in engine.run():
                found = answers_of(finished, plan, self.prompts, self.requests)
                answers |= {answer.request: _kept(answer) for answer in found}
        self.computed_tokens += engine.stats.prompt_tokens_computed
        return answers


@contextmanager
def stored_chunks_for(reuse: ChunkReuse | None, plan: Plan) -> Iterator[StoredChunks | None]:
    """What an engine for this plan is given."""
    with reuse.stored_chunks(plan) if reuse is not None else nullcontext() as stored:
        yield stored


def choose_sample(spec: ChunksSpec, pending: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[requests] a share of those that are pending, at least LEAST_SAMPLE of them if there are so many."""
    candidates = np.flatnonzero(pending)
    count = min(len(candidates), max(LEAST_SAMPLE, round(spec.sample * len(candidates))))
    chosen = np.zeros(len(pending), dtype=np.bool_)
    chosen[np.random.default_rng(_SEED).choice(candidates, count, replace=False)] = True
    return chosen


def reach_target(runner: SampleRunner, sample: ReuseSample, reuse: ChunkReuse, target: float) -> str:
    """Sets `reuse.share` to the smallest one with which enough of the sample's answers are those of a full computation.

    Where none does, nothing lossy is reused. Returns a sentence about it.
    """
    sample.full = runner.answer(sample.chosen, None)
    for share in SHARES:
        reuse.share = share
        found = runner.answer(sample.chosen, reuse)
        both = sorted(sample.full.keys() & found.keys())
        quality = compare_answers([sample.full[n] for n in both], [found[n] for n in both])
        sample.tried.append((share, quality))
        if quality.exact_match >= target:
            kept = f"{quality.exact_match:.1%} of a sample's answers stay as they are"
            return f"{share:.0%} of the reused tokens are computed again: {kept}"
    reuse.lookup.use_exact_only()
    reuse.share = 0.0
    return (
        f"no share up to {SHARES[-1]:.0%} keeps {target:.1%} of a sample as it is: only exact reuse is left"
    )


def _kept(answer: RequestResult) -> Answer:
    return Answer(answer.output or answer.error or "", answer.output_tokens)
