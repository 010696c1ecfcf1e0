"""From the input to token ids, in one pass: read a batch, render it, tokenise it, append it to files.

Prompts go to a token store, the id and the kept columns to an Arrow file; both are memory-mapped afterwards,
so a job of any size needs little memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from batchllm.core import ChunkTable, PromptTable, SamplingParams
from batchllm.dataset.chunk_spans import ChunkTableBuilder, check_tokenizer
from batchllm.dataset.columns import Logprobs, check_kept_names
from batchllm.dataset.encode import Tokenized, tokenize
from batchllm.dataset.params import RowParams
from batchllm.dataset.prompts import Prompt, PromptPlan, PromptRenderer, prompt_of
from batchllm.dataset.reader import InputData
from batchllm.dataset.reorder import choose_orders
from batchllm.dataset.rows import EMPTY_PROMPT, RowBatch, RowFault
from batchllm.dataset.tokens import TokenStoreWriter, open_tokens
from batchllm.dataset.values import with_valid_text
from batchllm.durable import writing
from batchllm.errors import JobError
from batchllm.job import JobSpec
from batchllm.planner.field_order import FieldOrder
from batchllm.suggest import column_hint

_NO_COLUMNS = RowFault("the row has no columns")


class Advances(Protocol):
    """Whoever wants to know how far loading is."""

    def advance(self, rows: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class LoadedRows:
    """The input, ready to be planned. Files in the work folder must outlive it."""

    prompts: PromptTable
    kept: pa.Table  # [rows] the id column, if the job names one, and the kept columns; memory-mapped
    ids: pa.ChunkedArray | None  # [rows] the id column
    chunks: ChunkTable | None  # [rows] None: the job has no chunks
    reordering_saves: int  # prompt tokens, about: what `prompt.reorder` adds to those that rows share
    read_seconds: float  # reading, rendering and writing
    tokenize_seconds: float


def validate_columns(job: JobSpec, schema: pa.Schema) -> None:
    """Raises JobError when the job names a column that is not there. Nothing has been written by then.

    An input without any column suits every job: it has no rows, or none that could be read (JSON lines).
    """
    if not schema.names:
        return
    named = {f"generate.{name}.column": column for name, column in job.generate.columns.items()}
    if job.input.id is not None:
        named["input.id"] = job.input.id
    if job.output.keep != "all":
        named |= {f"output.keep[{number}]": name for number, name in enumerate(job.output.keep)}
    for key, name in named.items():
        if name not in schema.names:
            hint = column_hint(name, schema.names)
            raise JobError(f"{job.source}: {key}: there is no column `{name}`; {hint}")
    generate, has_samples = job.generate, job.generate.n != 1
    shown = Logprobs(
        generate.logprobs is not False, generate.top_logprobs != 0, generate.prompt_logprobs is not None
    )
    if job.score is not None:
        shown = Logprobs(job.score.token_logprobs)
    try:
        check_kept_names(_kept_columns(job, schema), has_samples, shown, job.score is not None, job.input.id)
    except JobError as error:
        raise JobError(f"{job.source}: {error}") from None
    PromptPlan(job.prompt, schema, job.source, job.chunks.column if job.chunks else None)


def load_rows(
    job: JobSpec, input_data: InputData, tokenizer: Any, work_dir: Path, progress: Advances | None = None
) -> LoadedRows:
    """Every row as token ids or as a fault, in input order. Raises UserError before anything is written.

    Faults are kept per row and never raised. `work_dir` exists, and files of an earlier load in it are replaced.
    """
    validate_columns(job, input_data.schema)
    started = time.perf_counter()
    loader = _Loader(job, input_data, tokenizer)
    tokens_path, kept_path = work_dir / "prompts.tokens", work_dir / "kept.arrow"
    with TokenStoreWriter(tokens_path) as store, _KeptWriter(kept_path, loader.kept_schema) as kept_rows:
        for batch in input_data.batches(columns=loader.columns):
            tokenized = loader.load(batch)
            store.append(tokenized.ids)
            kept_rows.append(loader.kept(batch.data))
            if progress is not None:
                progress.advance(batch.num_rows, sum(map(len, tokenized.ids)))
    kept = pa.ipc.open_file(pa.memory_map(str(kept_path))).read_all()
    seconds = time.perf_counter() - started - loader.tokenize_seconds
    ids = None if job.input.id is None else kept.column(job.input.id)
    prompts = loader.prompt_table(tokens_path)
    saves = loader.reordering_saves(len(prompts.tokens))
    return LoadedRows(prompts, kept, ids, loader.chunk_table(), saves, seconds, loader.tokenize_seconds)


class _KeptWriter:
    """The Arrow file of the id and the kept columns. Raises WriteFailed."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._open_files = ExitStack()
        with writing(path):
            file = self._open_files.enter_context(pa.OSFile(str(path), "wb"))
            self._writer = self._open_files.enter_context(pa.ipc.new_file(file, schema))

    def append(self, rows: pa.RecordBatch) -> None:
        with writing(self._path):
            self._writer.write_batch(rows)

    def __enter__(self) -> _KeptWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with writing(self._path):
            self._open_files.close()


class _Loader:
    """What is gathered row by row."""

    def __init__(self, job: JobSpec, input_data: InputData, tokenizer: Any) -> None:
        schema = input_data.schema
        self._order: FieldOrder | None = None
        self._characters = 0
        self._tokenizer = tokenizer
        self._id = job.input.id
        self._params = RowParams(job.generate)
        self._params_of: list[int] = []
        self._faults: dict[int, str] = {}
        self.tokenize_seconds = 0.0
        self._chunks = ChunkTableBuilder() if job.chunks else None
        self._renderer: PromptRenderer | None = None  # None: the input has no columns
        kept = _kept_columns(job, schema)
        if not schema.names:
            self.kept_schema = pa.schema([(name, pa.null()) for name in kept])
            self.columns: list[str] = []
            return
        chunk_column = job.chunks.column if job.chunks else None
        if chunk_column is not None:
            check_tokenizer(tokenizer, job.source)
        self._renderer = PromptRenderer(job.prompt, tokenizer, schema, job.source, chunk_column)
        self.kept_schema = pa.schema([schema.field(name).with_nullable(True) for name in kept])
        used = {*kept, *self._renderer.columns, *self._params.columns}
        self.columns = [name for name in schema.names if name in used]
        if self._renderer.free is not None:
            self._order = choose_orders(self._renderer.free, input_data)

    def load(self, batch: RowBatch) -> Tokenized:
        """Token ids of each row of the batch, empty for the rows that turn out to be faulty."""
        first = len(self._params_of)
        prompts, params = self._prompts(batch, first)
        started = time.perf_counter()
        tokenized = tokenize(self._tokenizer, prompts)
        self.tokenize_seconds += time.perf_counter() - started
        self._characters += sum(len(prompt.text) for prompt in prompts if isinstance(prompt, Prompt))
        self._faults |= {first + row: fault.reason for row, fault in tokenized.faults.items()}
        if self._chunks is not None:
            for row in range(batch.num_rows):
                self._chunks.add(tokenized.chunks.get(row, ()))
        self._params_of += [index if isinstance(index, int) else 0 for index in params]
        return tokenized

    def _prompts(
        self, batch: RowBatch, first_row: int
    ) -> tuple[list[Prompt | RowFault], list[int | RowFault]]:
        """The prompt of each row, or the first thing that is wrong with it, and its parameters."""
        if self._renderer is None:
            faults = [batch.faults.get(row, _NO_COLUMNS) for row in range(batch.num_rows)]
            return [*faults], [*faults]
        prompts = self._renderer.render(batch.data, self._order, first_row)
        params = self._params.of(batch.data)
        ids = batch.data.column(self._id) if self._id is not None else None
        for row in range(batch.num_rows):
            fault = batch.faults.get(row)
            if fault is None and ids is not None and not ids[row].is_valid:
                fault = RowFault(f"column `{self._id}` is null")
            prompts[row] = fault or _first_fault(prompts[row], params[row])
        return prompts, params

    def chunk_table(self) -> ChunkTable | None:
        return self._chunks.build() if self._chunks is not None else None

    def kept(self, data: pa.RecordBatch) -> pa.RecordBatch:
        names = self.kept_schema.names
        if not names:
            return data.select([])
        if self._renderer is None:
            columns = [pa.nulls(data.num_rows)] * len(names)
        else:
            columns = [with_valid_text(data.column(name)) for name in names]
        return pa.record_batch(columns, schema=self.kept_schema)

    def reordering_saves(self, tokens: int) -> int:
        """The characters that the chosen order saves, as tokens of average length."""
        if self._order is None or not self._characters:
            return 0
        return round(self._order.gain.gain * tokens / self._characters)

    def prompt_table(self, tokens_path: Path) -> PromptTable:
        tokens, offsets = open_tokens(tokens_path)
        params_of = np.array(self._params_of, np.int32)
        return PromptTable(tokens, offsets, self._params.params, params_of, self._faults)


def _first_fault(prompt: Prompt | RowFault, params: int | RowFault) -> Prompt | RowFault:
    return params if isinstance(params, RowFault) and not isinstance(prompt, RowFault) else prompt


def _kept_columns(job: JobSpec, schema: pa.Schema) -> list[str]:
    """The id first, then the others as the job, or the input, orders them."""
    names = schema.names if job.output.keep == "all" else job.output.keep
    return list(dict.fromkeys([*([job.input.id] if job.input.id else []), *names]))


def prompts_from_list(
    prompts: Sequence[str | Sequence[int] | Mapping[str, Any] | Prompt | RowFault],
    params: SamplingParams | Sequence[SamplingParams],
    tokenizer: Any,
) -> PromptTable:
    """A table of prompts that are in memory: texts, token ids, `{prompt: ...}` / `{prompt_token_ids: ...}`, or
    prompts and faults as a renderer makes them.

    `params` is one for all or one for each. Raises ValueError when their numbers differ and TypeError for a
    prompt of another kind; an empty prompt and ids that no model has are faults of their rows.
    """
    params_list = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(params_list) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts need as many SamplingParams or one, found {len(params_list)}"
        )
    index_of: dict[SamplingParams, int] = {}
    params_of = [index_of.setdefault(item, len(index_of)) for item in params_list]
    contents = [
        prompt if isinstance(prompt, Prompt | RowFault) else _content(prompt, row)
        for row, prompt in enumerate(prompts)
    ]
    texts = [
        prompt_of(content, add_special_tokens=True) if isinstance(content, str) else content or EMPTY_PROMPT
        for content in contents
    ]
    tokenized = tokenize(tokenizer, texts)
    lengths = np.fromiter(map(len, tokenized.ids), np.int64, len(tokenized.ids))
    tokens = np.concatenate([np.empty(0, np.int32), *(np.asarray(ids, np.int32) for ids in tokenized.ids)])
    return PromptTable(
        tokens,
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        tuple(index_of),
        np.array(params_of, np.int32),
        {row: fault.reason for row, fault in tokenized.faults.items()},
    )


def _content(prompt: str | Sequence[int] | Mapping[str, Any], row: int) -> str | list[int] | RowFault:
    value: Any = prompt
    if isinstance(prompt, Mapping):
        given = prompt.get("prompt_token_ids")
        value = prompt.get("prompt") if given is None else given
        if prompt.get("multi_modal_data"):
            raise TypeError(f"prompt {row} has multi_modal_data, and BatchLLM reads text only")
    if isinstance(value, str):
        return str(value)  # numpy has a text of its own
    for name in ("tolist", "to_list"):  # of an array or a tensor; of a Series
        value = getattr(value, name)() if hasattr(value, name) else value
    if isinstance(value, Sequence) and all(isinstance(token, int | np.integer) for token in value):
        ids = [int(token) for token in value]
        unknown = next((token for token in ids if not 0 <= token < 2**31), None)
        return (
            ids
            if unknown is None
            else RowFault(f"the prompt has the token id {unknown:,}, which no model knows")
        )
    raise TypeError(f"prompt {row} must be text or a list of token ids, found {type(prompt).__name__}")
