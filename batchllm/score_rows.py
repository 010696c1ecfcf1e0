"""The rows of a score job: which tokens of which text are scored, or why none are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm.core import IntArray, PromptTable, SamplingParams
from batchllm.dataset.choices import CHOICE, NUMBER, ChoiceRows
from batchllm.dataset.load import LoadedRows, load_rows, validate_columns
from batchllm.dataset.prompts import PromptPlan
from batchllm.dataset.reader import InputData
from batchllm.dataset.row_ids import plain_ids
from batchllm.errors import JobError
from batchllm.job import JobSpec
from batchllm.job_sections import PromptSpec
from batchllm.scoring import MergedContinuation, TokenSpan, span_fault, split_pair, windows


@dataclass(frozen=True)
class ScoreRows:
    """`prompts` holds whole texts. A row scores its tokens from `first` on; a document (`first` 0) all of them."""

    prompts: PromptTable
    first: IntArray  # [rows]
    kept: pa.Table
    ids: pa.ChunkedArray  # [rows] what tells rows apart beside their tokens

    def spans(self, row: int, prefix: int, max_length: int) -> list[TokenSpan]:
        """What of a row the model reads, piece by piece."""
        tokens = self.prompts.tokens[self.prompts.offsets[row] : self.prompts.offsets[row + 1]].tolist()
        first = int(self.first[row])
        return windows(tokens, prefix, max_length) if first == 0 else [TokenSpan(tokens, first)]


def check_score_job(job: JobSpec) -> None:
    """Raises JobError for what a score job cannot have."""
    assert job.score is not None
    wrong = {
        "prompt.reorder": job.prompt.reorder is not None,
        "generate": "generate" in job.model_fields_set,
        "plan": "plan" in job.model_fields_set,
    }
    key = next((key for key, given in wrong.items() if given), None)
    if key is not None:
        raise JobError(f"{job.source}: {key} cannot be together with score; remove one of them")


def score_input(job: JobSpec, data: InputData) -> InputData | ChoiceRows:
    """The input with a row for each choice, checked. Raises JobError."""
    assert job.score is not None
    rows = data if job.score.choices is None else ChoiceRows(data, job.score.choices, job.source)
    validate_columns(_context_job(job), rows.schema)
    validate_columns(_second_job(job, _is_chat(job, rows)), rows.schema)
    return rows


def load_score_rows(
    job: JobSpec, data: Any, tokenizer: Any, work_dir: Path, max_length: int | None, vocabulary: int
) -> ScoreRows:
    """Reads the input twice: contexts, and contexts with their continuations."""
    assert job.score is not None
    folders = work_dir / "contexts", work_dir / "wholes"
    for folder in folders:
        folder.mkdir(exist_ok=True)
    contexts = load_rows(_context_job(job), data, tokenizer, folders[0])
    if job.score.rolling:
        prompts, faults = contexts.prompts, dict(contexts.prompts.faults)
        first = np.zeros(prompts.num_rows, dtype=np.int64)
    else:
        is_chat = _is_chat(job, data)
        second = load_rows(_second_job(job, is_chat), data, tokenizer, folders[1]).prompts
        prompts = _appended(contexts.prompts, second, tokenizer) if is_chat else second
        first, faults = _first_scored(contexts.prompts, prompts)
        for row in np.flatnonzero(first > 0).tolist():
            span = TokenSpan(_row(prompts, row), int(first[row]))
            fault = span_fault(span, max_length, vocabulary)
            if fault is not None:
                faults[row] = fault
    table = PromptTable(
        prompts.tokens,
        prompts.offsets,
        (SamplingParams(max_tokens=1),),
        np.zeros(prompts.num_rows, np.int32),
        faults,
    )
    return ScoreRows(table, first, contexts.kept, _ids(contexts, first))


def _first_scored(contexts: PromptTable, wholes: PromptTable) -> tuple[IntArray, dict[int, str]]:
    faults = {**wholes.faults, **contexts.faults}
    first = np.full(contexts.num_rows, -1, dtype=np.int64)
    for row in range(contexts.num_rows):
        if row not in faults:
            try:
                first[row] = split_pair(_row(contexts, row), _row(wholes, row)).first
            except MergedContinuation as error:
                faults[row] = f"score.continuation: {error}"
    return first, faults


def _appended(contexts: PromptTable, continuations: PromptTable, tokenizer: Any) -> PromptTable:
    """Continuations behind conversations. These end with a token of the chat template, across which nothing merges."""
    special = tokenizer("", return_attention_mask=False)["input_ids"]  # BOS, where the tokenizer writes one
    faults = {row: f"score.continuation: {reason}" for row, reason in continuations.faults.items()}
    rows = []
    for row in range(contexts.num_rows):
        added = _row(continuations, row)
        added = added[len(special) :] if added[: len(special)] == list(special) else added
        rows.append(np.array([*_row(contexts, row), *added], dtype=np.int32))
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    tokens = np.concatenate([np.zeros(0, np.int32), *rows])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return replace(contexts, tokens=tokens, offsets=offsets, faults={**faults, **contexts.faults})


def _is_chat(job: JobSpec, data: Any) -> bool:
    return bool(data.schema.names) and PromptPlan(job.prompt, data.schema, job.source).is_chat


def _row(prompts: PromptTable, row: int) -> list[int]:
    tokens: list[int] = prompts.tokens[prompts.offsets[row] : prompts.offsets[row + 1]].tolist()
    return tokens


def _ids(rows: LoadedRows, first: IntArray) -> pa.ChunkedArray:
    """The id column and where scoring begins: the same text divided otherwise is another row."""
    ids = itertools.repeat(None, len(first)) if rows.ids is None else plain_ids(rows.ids)
    return pa.chunked_array(
        [pa.array([repr((start, id_)) for start, id_ in zip(first.tolist(), ids)], pa.string())]
    )


def _context_job(job: JobSpec) -> JobSpec:
    return _with_kept_choices(job, job.prompt)


def _second_job(job: JobSpec, is_chat: bool) -> JobSpec:
    """The same with the continuation behind each prompt; where prompts are conversations, with it alone."""
    assert job.score is not None
    if is_chat or job.score.rolling:
        return _with_kept_choices(job, PromptSpec(text=job.score.template) if is_chat else job.prompt)
    context = job.prompt.text
    if job.prompt.column is not None:
        context = f"{{{{ row[{job.prompt.column!r}] }}}}"
    # As jinja does with the end of a template; here it is no longer the end.
    text = (context or "").removesuffix("\n") + job.score.template
    return _with_kept_choices(job, PromptSpec(text=text))


def _with_kept_choices(job: JobSpec, prompt: PromptSpec) -> JobSpec:
    keep = job.output.keep
    if job.score is not None and job.score.choices is not None and keep != "all":
        keep = tuple(dict.fromkeys([*keep, NUMBER, CHOICE]))
    changed = job.model_copy(
        update={"prompt": prompt, "output": job.output.model_copy(update={"keep": keep})}
    )
    changed._source = job.source
    return changed
