"""The results of a job while they are being made: what is answered already, and where new answers go.

    with ResultStore.open(path, identity, requests, kept) as store:
        todo = ~store.done
        ...
        store.add(results)          # any number of times, in any order, every request once
        store.finish()              # when every request is answered

Whatever ends the process, the answers in parts stay, and the next `open` takes them over.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from batchllm.core import IntArray, RequestResult, RequestTable
from batchllm.dataset.claim import Claim, claim_output
from batchllm.dataset.columns import NO_LOGPROBS, Columns, Logprobs, RowReader
from batchllm.dataset.finish import (
    DamagedPart,
    complete_commit,
    final_parts,
    prepare_commit,
    recover,
    remove_workspace,
)
from batchllm.dataset.folder import (
    MANIFEST_FORMAT,
    Folder,
    check_output,
    read_manifest,
    remove_results,
)
from batchllm.dataset.parts import job_digest, live_name, live_number, write_part
from batchllm.dataset.reasons import Reasons
from batchllm.dataset.resume import Inherited, next_live_number, take_over
from batchllm.dataset.superseded import Superseded
from batchllm.durable import WriteFailed, write_bytes, write_json
from batchllm.errors import JobError
from batchllm.job_values import MAX_PART_ROWS
from batchllm.versions import batchllm_version

__all__ = ["ResultStore", "check_output", "claim_output"]


class ResultStore:
    """The output folder of one running job. One thread uses it; a lock keeps other processes out."""

    def __init__(
        self,
        folder: Folder,
        columns: Columns,
        inherited: Inherited,
        header: dict[str, Any],
        faults: Mapping[int, str],
    ) -> None:
        """For `open` only."""
        self.path = folder.path
        self.done: NDArray[np.bool_] = inherited.done  # [requests] answered: in a part, or about to be
        self.num_resumed = int(inherited.done.sum())
        self.num_superseded = inherited.superseded
        self.errors = _earlier_errors(columns.requests, inherited, faults)  # of the answered requests
        self.notes: list[str] = _notes(folder, inherited)
        self._folder = folder
        self._held = contextlib.ExitStack()  # what `close` lets go of
        self._columns = columns
        self._header = header
        self._parts: dict[str, IntArray] = inherited.parts
        self._finished = inherited.complete
        self._pending = _Pending(live_name(next_live_number(folder)))
        self._last_flush = time.monotonic()

    @classmethod
    def open(
        cls,
        path: Path,
        identity: str,
        requests: RequestTable,
        kept: pa.Table,
        *,
        configuration: bytes = b"",
        logprobs: Logprobs = NO_LOGPROBS,
        scores: bool = False,
        faults: Mapping[int, str] | None = None,
        part_rows: int = 50_000,
        flush_seconds: float = 30.0,
        resolved_job: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        claim: Claim | None = None,
    ) -> ResultStore:
        """Takes over earlier answers, and says in `done` which requests they answer.

        `kept` holds the id and kept columns, one row per input row; `faults` are the rows without a prompt,
        whose errors are final. Errors of other rows are dropped, so they are tried again.
        Without a `claim` on this path, which the caller goes on holding, the store makes one of its own. `overwrite`
        is for that: another job's results are removed, and this job's own stay.
        """
        if not 1 <= part_rows <= MAX_PART_ROWS:
            raise JobError(f"output.part_rows: must be between 1 and {MAX_PART_ROWS:,}, not {part_rows:,}")
        columns = Columns(requests, kept, logprobs, scores)
        with contextlib.ExitStack() as held:
            if claim is None:
                claim = held.enter_context(claim_output(path, identity, overwrite))
            folder = claim.folder
            if claim.replaces:
                remove_results(folder)
            recover(folder)
            inherited = take_over(folder, columns, job_digest(identity), faults or {}, part_rows)
            header = _manifest_header(folder, identity, configuration, requests, part_rows, flush_seconds)
            store = cls(folder, columns, inherited, header, faults or {})
            if resolved_job is not None:
                text = yaml.safe_dump(dict(resolved_job), sort_keys=False, allow_unicode=True)
                write_bytes(folder.run / "job.yaml", text.encode(errors="replace"))
            store._write_manifest("finished" if store._finished else "running")
            store._held = held.pop_all()
        return store

    @property
    def parts(self) -> Mapping[str, IntArray]:
        """The files that hold answers, and the request of each of their rows."""
        return self._parts

    @property
    def num_errors(self) -> int:
        """Answered requests that are errors."""
        return self.errors.total

    def add(self, results: Sequence[RequestResult]) -> None:
        """Answers that have just been found. Written when a part is full or old enough."""
        for result in results:
            assert not self.done[result.request], f"request {result.request} is answered twice"
            self._pending.results.append(result)
            self.done[result.request] = True
            if result.finish_reason == "error":
                self.errors.add(result.error or "unknown")
            if len(self._pending.results) >= self._header["part_rows"]:
                self.flush()
        if self._pending.results and time.monotonic() - self._last_flush >= self._header["flush_seconds"]:
            self.flush()

    def flush(self) -> None:
        """Afterwards every answer added so far survives kill -9.

        Repeating an interrupted flush writes the same rows to the same name: none is written twice or lost.
        """
        self._last_flush = time.monotonic()
        if not self._pending.results:
            return
        results = sorted(self._pending.results, key=lambda result: result.request)
        requests = np.array([result.request for result in results], dtype=np.int64)
        answers = RowReader(self._columns.answer_table(results))
        self._write(self.path / self._pending.name, requests, answers)
        self._parts[self._pending.name] = requests
        self._pending = _Pending(live_name(1 + (live_number(self._pending.name) or 0)))
        self._write_manifest("running")

    def finish(self) -> None:
        """The whole result in input order. Every request is answered."""
        assert self.done.all(), f"{int((~self.done).sum())} requests are not answered"
        self.flush()
        if not self._finished:
            try:
                prepare_commit(
                    self._folder, self._columns, self._header["job"], self._parts, self._header["part_rows"]
                )
            except DamagedPart as part:
                del self._parts[part.name]
                Superseded(self._folder, self._columns.requests).move(self.path / part.name, part.name)
                raise WriteFailed(
                    f"{self.path / part.name}: was damaged after it was written; "
                    "run the same command again to compute its rows anew"
                ) from part
            complete_commit(self._folder)
        self._finish_manifest()

    def close(self) -> None:
        """Writes what is pending and lets go of the folder. Harmless after `finish` and when repeated."""
        try:
            if not self._finished:
                self.flush()
                # Ctrl-C may have come when all was written and half was renamed.
                if self._folder.commit_marker.exists():
                    complete_commit(self._folder)
                    self._finish_manifest()
                else:
                    self._write_manifest("interrupted")
        finally:
            self._held.close()

    def __enter__(self) -> ResultStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # When a write has failed, the last attempt of `close` fails as well and would only hide the first.
        with contextlib.suppress(WriteFailed) if isinstance(error, WriteFailed) else contextlib.nullcontext():
            self.close()

    def _write(self, path: Path, requests: IntArray, answers: RowReader) -> None:
        rows = np.arange(len(requests), dtype=np.int64)
        write_part(path, self._folder.scratch, self._columns, self._header["job"], requests, answers, rows)

    def _finish_manifest(self) -> None:
        self._finished = True
        self._parts = final_parts(len(self.done), self._header["part_rows"])
        self._write_manifest("finished")
        remove_workspace(self._folder)

    def _write_manifest(self, status: str) -> None:
        answered = sum(len(requests) for requests in self._parts.values())
        counts = {
            "requests": len(self.done),
            "answered": answered,
            "errors": self.num_errors,
            "resumed": self.num_resumed,
            "superseded": self.num_superseded,
        }
        parts = [{"name": name, "rows": len(requests)} for name, requests in self._parts.items()]
        head = {**self._header, "updated": _now(), "status": status}
        # The parts say all of it again, so a manifest that a power cut damages is no loss.
        manifest = {**head, "counts": counts, "parts": parts}
        write_json(self._folder.manifest, manifest, durable=status != "running")


class _Pending:
    """Answers not yet in a part, bound to the name that the part will have."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.results: list[RequestResult] = []


def _manifest_header(
    folder: Folder,
    identity: str,
    configuration: bytes,
    requests: RequestTable,
    part_rows: int,
    flush_seconds: float,
) -> dict[str, Any]:
    earlier = read_manifest(folder)
    return {
        "format": MANIFEST_FORMAT,
        "identity": identity,
        "job": job_digest(identity),
        "configuration": xxh3_128_hexdigest(configuration),
        "requests": xxh3_128_hexdigest(requests.key.tobytes()),
        "batchllm": batchllm_version(),
        "started": earlier.get("started", _now()),
        "part_rows": part_rows,
        "flush_seconds": flush_seconds,
    }


def _earlier_errors(requests: RequestTable, inherited: Inherited, faults: Mapping[int, str]) -> Reasons:
    """Errors that are kept are those of rows without a prompt."""
    faulty = np.isin(requests.row, np.fromiter(faults, dtype=np.int64, count=len(faults)))
    return Reasons(faults[row] for row in requests.row[faulty & inherited.done].tolist())


def _notes(folder: Folder, inherited: Inherited) -> list[str]:
    notes = []
    if inherited.superseded:
        notes.append(
            f"{inherited.superseded:,} earlier answers no longer match (model, prompt, sampling or input "
            f"changed) and were set aside in {folder.superseded}, from where they come back when they match again"
        )
    if inherited.taken_back:
        notes.append(
            f"{inherited.taken_back:,} answers that had been set aside match again and were taken back"
        )
    if inherited.retried:
        notes.append(f"{inherited.retried:,} rows that failed in an earlier run are tried again")
    if inherited.torn:
        notes.append(
            f"{inherited.torn:,} damaged parts were set aside in {folder.superseded}; "
            "their rows are computed again"
        )
    return notes


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
