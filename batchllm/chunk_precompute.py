"""`batchllm precompute`: computes the chunks of a job's rows and puts them into its store.

A chunk is computed where it stands: in the prompts of rows that show it, in as many contexts as `chunks.contexts` says.
`chunks.variants` of them are stored; what differs between all of them is the chunk's sensitivity. A prompt is computed
only if it has a chunk that lacks a context; what all its chunks need is taken from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from batchllm.chunk_reuse import identity_of, refuse_gpu
from batchllm.chunkcache.codecs import Codec, codec_named
from batchllm.chunkcache.identity import chunk_context, chunk_key
from batchllm.chunkcache.key_rotation import KeyRotation, find_rotation
from batchllm.chunkcache.precompute import ChunkedPrompt, ComputedChunk, compute_chunks, merged
from batchllm.chunkcache.store import ChunkStore
from batchllm.core import ChunkTable, PromptTable
from batchllm.dataset.load import load_rows, validate_columns
from batchllm.dataset.reader import open_input
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.errors import JobError
from batchllm.executor.gate import LengthLimit
from batchllm.executor.generation_config import load_generation_config
from batchllm.executor.model import ModelRunner
from batchllm.executor.native import missing_kernels_note
from batchllm.job import JobSpec
from batchllm.job_model import check_model, load_checked_model
from batchllm.limits import ModelLimits, usable
from batchllm.report.progress import Progress
from batchllm.report.sizes import size_text
from batchllm.report.stopwatch import Stopwatch

_MOST_PENDING_BYTES = 1 << 30  # KV of chunks whose other contexts have not come yet


@dataclass
class PrecomputeSummary:
    """What came of it."""

    rows: int = 0
    faulty_rows: int = 0
    first_fault: str = ""
    chunks: int = 0  # distinct
    stored: int = 0  # variants put
    not_stored: int = 0  # for lack of room
    tokens_computed: int = 0
    store_bytes: int = 0

    @property
    def text(self) -> str:
        lines = [
            f"{self.chunks:,} chunks in {self.rows:,} rows; {self.stored:,} variants stored, "
            f"{self.tokens_computed:,} tokens computed",
            f"the store has {size_text(self.store_bytes)}",
        ]
        if self.faulty_rows:
            lines.append(f"{self.faulty_rows:,} rows were left out; the first: {self.first_fault}")
        if self.not_stored:
            lines.append(f"{self.not_stored:,} variants did not fit into chunks.store_limit")
        return "\n".join(lines)


def precompute_job(job: JobSpec, *, quiet: bool = False) -> PrecomputeSummary:
    """Raises UserError; what is in the store by then stays."""
    if job.chunks is None:
        raise JobError(f"{job.source}: precompute needs a section chunks with column and store")
    progress = Progress(quiet=quiet)
    config, limit, placement = check_model(job)
    refuse_gpu(job, placement)
    if placement.note:
        progress.note(placement.note)
    with TemporaryDirectory() as work:
        prompts, chunks = _load_prompts(job, config, limit, Path(work), progress)
        model = load_checked_model(job, Stopwatch(), placement).model
        slow = missing_kernels_note(model)
        if slow:
            progress.note(slow)
        most = job.chunks.store_limit
        with ChunkStore(
            job.chunks.store,
            identity_of(job, model),
            write=True,
            limit=most if isinstance(most, int) else None,
        ) as store:
            codec = codec_named(job.chunks.codec, model.dtype)
            variants, contexts = job.chunks.variants, job.chunks.contexts
            summary = Precompute(model, store, codec, prompts, chunks, variants, contexts).run(progress)
            for problem in store.problems:
                progress.note(problem)
            summary.store_bytes = store.used_bytes()
    return summary


def _load_prompts(
    job: JobSpec, config: Any, limit: LengthLimit | None, work_dir: Path, progress: Progress
) -> tuple[PromptTable, ChunkTable]:
    """Faults are those that a run would give the rows for their prompts."""
    tokenizer = load_tokenizer(job.model.path, job.model.trust_remote_code)
    data = open_input(job.input, job.source, job.output.folders)
    validate_columns(job, data.schema)
    with progress.stage("tokenizing", data.num_rows) as stage:
        rows = load_rows(job, data, tokenizer, work_dir, stage)
    assert rows.chunks is not None
    generation = load_generation_config(job.model.path, config)
    limits = ModelLimits.of(config, limit, generation, tokenizer)
    return usable(rows.prompts, limits, tokenizer), rows.chunks


class Precompute:
    """Fills a store from prompts."""

    def __init__(
        self,
        model: ModelRunner,
        store: ChunkStore,
        codec: Codec,
        prompts: PromptTable,
        chunks: ChunkTable,
        variants: int,
        contexts: int = 1,
    ):
        self.model, self.store, self.codec = model, store, codec
        self.prompts, self.chunks = prompts, chunks
        self.variants, self.contexts = variants, max(variants, contexts)
        self.rotation: KeyRotation = find_rotation(model)
        self.summary = PrecomputeSummary()
        self._contexts: dict[bytes, set[bytes]] = {}  # chunk → digests of the contexts it is there in
        self._uses = self._count_uses()
        self._pending: dict[bytes, list[ComputedChunk]] = {}
        self._pending_bytes = 0

    def run(self, progress: Progress) -> PrecomputeSummary:
        """Every row in turn."""
        faults = self.prompts.faults
        self.summary.rows = self.prompts.num_rows
        self.summary.faulty_rows = len(faults)
        self.summary.first_fault = f"row {min(faults)}: {faults[min(faults)]}" if faults else ""
        self.summary.chunks = len(self._uses)
        with progress.stage("computing", self.prompts.num_rows) as stage:
            for prompt in self._prompts():
                if self._wanted(prompt):
                    self._compute(prompt)
                for index in range(len(prompt.chunks)):
                    self._seen(chunk_key(self.store.model, prompt.chunk_tokens(index)))
                stage.advance(1, len(prompt.tokens))
        for key in list(self._pending):
            self._store(key)
        return self.summary

    def _prompts(self) -> Iterator[ChunkedPrompt]:
        for row in range(self.prompts.num_rows):
            tokens = self.prompts.tokens[self.prompts.offsets[row] : self.prompts.offsets[row + 1]]
            places = self.chunks.of(row)
            if len(tokens) and places and row not in self.prompts.faults:
                yield ChunkedPrompt(np.asarray(tokens), tuple(places))

    def _count_uses(self) -> dict[bytes, int]:
        """How often each chunk will still come."""
        uses: dict[bytes, int] = {}
        for prompt in self._prompts():
            for index in range(len(prompt.chunks)):
                key = chunk_key(self.store.model, prompt.chunk_tokens(index))
                uses[key] = uses.get(key, 0) + 1
        return uses

    def _wanted(self, prompt: ChunkedPrompt) -> list[int]:
        """The chunks of a prompt that lack this context and have room for one more."""
        keys = [
            chunk_key(self.store.model, prompt.chunk_tokens(index)) for index in range(len(prompt.chunks))
        ]
        wanted = []
        for index, key in enumerate(keys):
            known = self._known(key)
            if len(known) >= self.contexts:
                continue
            before = chunk_context(prompt.tokens[: prompt.chunks[index][0]], keys[:index])
            if before.digest not in known:
                wanted.append(index)
        return wanted

    def _known(self, key: bytes) -> set[bytes]:
        if key not in self._contexts:
            codec = self.codec.name.encode()
            stored = self.store.variants(key)
            known = {each.context for each in stored if each.codec.rstrip(b"\0") == codec}
            # With all its variants in the store nothing more is wanted: their sensitivity is known.
            full = len(known) >= self.variants
            self._contexts[key] = known | ({bytes([n]) for n in range(self.contexts)} if full else set())
        return self._contexts[key]

    def _compute(self, prompt: ChunkedPrompt) -> None:
        self.summary.tokens_computed += prompt.chunks[-1][1]
        for chunk in compute_chunks(self.model, self.rotation, prompt, self.store.model):
            key = chunk_key(self.store.model, chunk.tokens)
            known = self._known(key)
            if len(known) < self.contexts and chunk.context.digest not in known:
                known.add(chunk.context.digest)
                self._pending.setdefault(key, []).append(chunk)
                self._pending_bytes += _num_bytes(chunk)
        while self._pending_bytes > _MOST_PENDING_BYTES:
            self._store(next(iter(self._pending)))

    def _seen(self, key: bytes) -> None:
        """A chunk with all its contexts, or one that will not come again, is stored."""
        self._uses[key] -= 1
        if key in self._pending and (not self._uses[key] or len(self._known(key)) >= self.contexts):
            self._store(key)

    def _store(self, key: bytes) -> None:
        computed = self._pending.pop(key)
        self._pending_bytes -= sum(map(_num_bytes, computed))
        stored = sum(
            each.codec.rstrip(b"\0") == self.codec.name.encode() for each in self.store.variants(key)
        )
        for chunk in computed[: max(0, self.variants - stored)]:
            whole = merged(chunk, computed)
            dtype = str(self.model.dtype).removeprefix("torch.")
            if self.store.put(whole.header(self.store.model, self.codec, dtype), whole.encoded(self.codec)):
                self.summary.stored += 1
            else:
                self.summary.not_stored += 1


def _num_bytes(chunk: ComputedChunk) -> int:
    return sum(states.nbytes for states in (*chunk.keys, *chunk.values))
