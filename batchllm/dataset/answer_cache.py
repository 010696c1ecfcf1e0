"""Answers kept across jobs (`output.cache`): Parquet files in a folder that any number of jobs may share.

What an answer is made from is its key. A greedy answer is made from configuration, parameters and prompt; that of a row
that samples from its request's own key (`dataset/keys`), which holds the id too, because random numbers come from it.
Each run adds files and changes none, so runs can share the folder at the same time; the first of equal keys counts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchllm.core import PromptTable, RequestResult, RequestTable
from batchllm.dataset.columns import Columns, Logprobs
from batchllm.dataset.keys import content_keys, match_keys
from batchllm.dataset.prompt_columns import prompt_logprobs_of
from batchllm.durable import check_writable, sync_file
from batchllm.errors import OutputError

_KEY = pa.field("key", pa.binary(16))
_FILE_ROWS = 10_000


def check_cache(folder: Path, source: str) -> None:
    """Raises OutputError where nothing can be kept."""
    try:
        check_writable(folder)
    except OutputError as error:
        raise OutputError(f"{source}: output.cache: {error}") from None


class AnswerCache:
    """The cache of one run. `found` answers what is known; `add` keeps what has been computed, `flush` writes it.

    Where writing fails, `note` is told once and no more is kept: the job does not need it.
    """

    def __init__(
        self,
        folder: Path,
        prompts: PromptTable,
        requests: RequestTable,
        configuration: bytes,
        note: Callable[[str], None],
    ) -> None:
        self._folder, self._prompts, self._requests = folder, prompts, requests
        self._note, self._keeps = note, True
        self._keys = requests.key.copy()
        greedy = np.array([params.greedy for params in prompts.params], dtype=bool)
        is_greedy = greedy[prompts.params_of[requests.row]]
        if is_greedy.any():
            self._keys[is_greedy] = content_keys(prompts, configuration)[requests.row[is_greedy]]
        self._known: set[bytes] = set()  # of this run; what others add meanwhile is kept twice, no more
        columns = Columns(requests, pa.table({}), Logprobs(True, True, True))
        self._answer_table = columns.answer_table
        self._new: list[RequestResult] = []

    def found(self, pending: NDArray[np.bool_]) -> list[RequestResult]:
        """Answers to pending requests [requests, bool] that some run has computed before."""
        wanted = np.flatnonzero(pending)
        by_key: dict[bytes, list[int]] = {}
        for request in wanted.tolist():
            by_key.setdefault(self._keys[request].tobytes(), []).append(request)
        unique = np.array([requests[0] for requests in by_key.values()], dtype=np.int64)
        results: list[RequestResult] = []
        for path in sorted(self._folder.glob("answers-*.parquet")):
            rows = self._matching_rows(path, self._keys[unique])
            for row in rows:
                key = np.frombuffer(row["key"], dtype=np.uint64).tobytes()
                if key not in self._known:
                    self._known.add(key)
                    results += [self._result(request, row) for request in by_key[key]]
        return results

    def add(self, results: Sequence[RequestResult]) -> None:
        """Keeps new answers; errors may be other next time."""
        for result in results if self._keeps else ():
            key = self._keys[result.request].tobytes()
            if result.finish_reason in ("stop", "length") and key not in self._known:
                self._known.add(key)
                self._new.append(result)
        if len(self._new) >= _FILE_ROWS:
            self.flush()

    def flush(self) -> None:
        """Afterwards other runs find what was added."""
        if not self._new:
            return
        try:
            self._write()
        except OSError as error:
            self._keeps = False
            reason = os.strerror(error.errno) if error.errno else str(error)
            self._note(
                f"output.cache: {self._folder} cannot be written ({reason}), so answers are not kept there"
            )
        self._new = []

    def _write(self) -> None:
        table = self._answer_table(self._new)
        keys = pa.array([self._keys[result.request].tobytes() for result in self._new], _KEY.type)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"answers-{uuid4().hex}.parquet"
        temporary = path.with_suffix(".tmp")
        try:
            pq.write_table(table.append_column(_KEY, keys), temporary)
            sync_file(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _matching_rows(self, path: Path, wanted: NDArray[np.uint64]) -> list[dict[str, Any]]:
        """Rows of a file with these keys; none of a file that cannot be read."""
        try:
            stored = pq.read_table(path, columns=["key"]).column("key").combine_chunks()
            raw = b"".join(key.as_py() for key in stored)
            keys = np.frombuffer(raw, dtype=np.uint64).reshape(-1, 2)
            rows = np.flatnonzero(match_keys(wanted, keys) >= 0)
            return pq.read_table(path).take(pa.array(rows)).to_pylist() if len(rows) else []
        except (OSError, pa.ArrowException):
            return []

    def _result(self, request: int, row: dict[str, Any]) -> RequestResult:
        row_of = self._requests.row[request]
        prompt_tokens = int(self._prompts.offsets[row_of + 1] - self._prompts.offsets[row_of])
        top = row["top_logprobs"]
        return RequestResult(
            request=request,
            output=row["output"],
            output_tokens=tuple(row["output_tokens"]),
            finish_reason=row["finish_reason"],
            error=None,
            prompt_tokens=prompt_tokens,
            shared_tokens=prompt_tokens,
            logprobs=None if row["logprobs"] is None else tuple(row["logprobs"]),
            top_logprobs=None
            if top is None
            else tuple(tuple((item["token"], item["logprob"]) for item in beside) for beside in top),
            prompt_logprobs=prompt_logprobs_of(row),
        )
