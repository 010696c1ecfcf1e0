"""A small job without a model: rows whose answers are known, for tests of the output folder.

As a script it is the process that tests kill: it opens the folder, answers what is missing, and finishes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from batchllm.core import PromptTable, RequestResult, RequestTable, SamplingParams
from batchllm.dataset.columns import Logprobs
from batchllm.dataset.keys import make_requests
from batchllm.dataset.results import ResultStore

IDENTITY = "questions.parquet"


@dataclass(frozen=True)
class World:
    """A job: row i has the id `names[i]`, a prompt made of it, and a kept column `note`."""

    names: Sequence[str]
    n: int = 1
    configuration: bytes = b"model"
    max_tokens: int = 16
    note: str = "note of"
    logprobs: bool = False
    faults: Mapping[int, str] | None = None

    @property
    def requests(self) -> RequestTable:
        rows = [list(name.encode()) for name in self.names]
        params = SamplingParams(n=self.n, temperature=1.0, max_tokens=self.max_tokens, logprobs=self.logprobs)
        prompts = PromptTable(
            tokens=np.array([t for row in rows for t in row], dtype=np.int32),
            offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
            params=(params,),
            params_of=np.zeros(len(rows), dtype=np.int32),
            faults=self.faults or {},
        )
        return make_requests(prompts, self.kept.column("id"), self.configuration)

    @property
    def kept(self) -> pa.Table:
        columns = {"id": list(self.names), "note": [f"{self.note} {name}" for name in self.names]}
        table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        return pa.Table.from_batches(table.to_batches(max_chunksize=7), table.schema)

    def answer(self, request: int, requests: RequestTable) -> RequestResult:
        """Depends on what the answer is made from, so that a wrong one is seen."""
        row, sample = int(requests.row[request]), int(requests.sample[request])
        if self.faults and row in self.faults:
            return RequestResult(request, None, (), "error", self.faults[row], 0, 0)
        name = self.names[row]
        return RequestResult(
            request=request,
            output=self.text(name, sample),
            output_tokens=tuple(name.encode()),
            finish_reason="stop",
            error=None,
            prompt_tokens=len(name),
            shared_tokens=row % 3,
            logprobs=(-0.5,) * len(name) if self.logprobs else None,
        )

    def text(self, name: str, sample: int) -> str:
        return f"{self.configuration.decode()} {self.max_tokens} {name} {sample}"

    def rows(self) -> list[tuple[str, int, str, str]]:
        """The whole result: (id, sample, note, output)."""
        return [
            (name, sample, f"{self.note} {name}", self.text(name, sample))
            for name in self.names
            for sample in range(self.n)
        ]

    def open(
        self, out: Path, part_rows: int = 10, flush_seconds: float = 1e9, overwrite: bool = False
    ) -> ResultStore:
        return ResultStore.open(
            out,
            IDENTITY,
            self.requests,
            self.kept,
            configuration=self.configuration,
            logprobs=Logprobs(self.logprobs),
            faults=self.faults,
            part_rows=part_rows,
            flush_seconds=flush_seconds,
            resolved_job={"model": {"path": "m"}},
            overwrite=overwrite,
        )

    def fill(self, store: ResultStore, limit: int | None = None, pause: float = 0.0) -> None:
        """Answers what is missing, or some of it, in an order that is not that of the input."""
        requests = self.requests
        missing = np.flatnonzero(~store.done)
        order = np.random.default_rng(len(missing)).permutation(missing)[:limit]
        for request in order:
            store.add([self.answer(int(request), requests)])
            if pause:
                time.sleep(pause)

    def run(self, out: Path, part_rows: int = 10) -> ResultStore:
        with self.open(out, part_rows) as store:
            self.fill(store)
            store.finish()
        return store


def names(numbers: Iterable[int]) -> list[str]:
    return [f"row{number}" for number in numbers]


def main() -> None:
    """results_world.py OUT ROWS PART_ROWS PAUSE: prints `ready` when it is about to open the folder."""
    out, rows, part_rows, pause = Path(sys.argv[1]), *map(int, sys.argv[2:4]), float(sys.argv[4])
    world = World(names(range(rows)))
    print("ready", flush=True)
    with world.open(out, part_rows) as store:
        world.fill(store, pause=pause)
        print("finishing", flush=True)
        store.finish()


if __name__ == "__main__":
    main()
