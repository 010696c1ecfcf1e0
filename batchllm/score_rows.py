"""The rows of a score job: which tokens of which text are scored, or why none are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm.core import IntArray, PromptTable, SamplingParams
from batchllm.dataset.choices import CHOICE, NUMBER, ChoiceRows
from batchllm.dataset.load import LoadedRows, load_rows, validate_columns
from batchllm.dataset.reader import InputData
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
        "prompt.messages": job.prompt.messages is not None,
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
    for part in (_context_job(job), _whole_job(job)):
        validate_columns(part, rows.schema)
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
    wholes = contexts if job.score.rolling else load_rows(_whole_job(job), data, tokenizer, folders[1])
    first, faults = _first_scored(contexts, wholes, job.score.rolling)
    prompts = wholes.prompts
    if not job.score.rolling:
        for row in np.flatnonzero(first > 0).tolist():
            tokens = prompts.tokens[prompts.offsets[row] : prompts.offsets[row + 1]].tolist()
            fault = span_fault(TokenSpan(tokens, int(first[row])), max_length, vocabulary)
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


def _first_scored(contexts: LoadedRows, wholes: LoadedRows, rolling: bool) -> tuple[IntArray, dict[int, str]]:
    faults = dict(contexts.prompts.faults)
    if rolling:
        return np.zeros(contexts.prompts.num_rows, dtype=np.int64), faults
    faults = {**wholes.prompts.faults, **faults}
    first = np.full(contexts.prompts.num_rows, -1, dtype=np.int64)
    for row in range(contexts.prompts.num_rows):
        if row not in faults:
            try:
                first[row] = split_pair(_row(contexts.prompts, row), _row(wholes.prompts, row)).first
            except MergedContinuation as error:
                faults[row] = f"score.continuation: {error}"
    return first, faults


def _row(prompts: PromptTable, row: int) -> list[int]:
    tokens: list[int] = prompts.tokens[prompts.offsets[row] : prompts.offsets[row + 1]].tolist()
    return tokens


def _ids(rows: LoadedRows, first: IntArray) -> pa.ChunkedArray:
    """The id column and where scoring begins: the same text divided otherwise is another row."""
    ids = itertools.repeat(None, len(first)) if rows.ids is None else rows.ids.to_pylist()
    return pa.chunked_array(
        [pa.array([repr((start, id_)) for start, id_ in zip(first.tolist(), ids)], pa.string())]
    )


def _context_job(job: JobSpec) -> JobSpec:
    return _with_kept_choices(job, job.prompt)


def _whole_job(job: JobSpec) -> JobSpec:
    """The same with the continuation behind each prompt."""
    assert job.score is not None
    context = job.prompt.text
    if job.prompt.column is not None:
        context = f"{{{{ row[{job.prompt.column!r}] }}}}"
    # As jinja does with the end of a template; here it is no longer the end.
    text = (context or "").removesuffix("\n") + ("" if job.score.rolling else job.score.template)
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
