"""How long planning takes, and how much memory: synthetic jobs, generated on the fly into a memory-mapped token file.

    python -m benchmarks.planner                        # 100k x 1000, 1M x 1000, 10M x 100; needs 8.4 GB of disk
    python -m benchmarks.planner --repeats 3 --scratch tokens   # all in turn, three times; token files are kept
    python -m benchmarks.planner --cases 100000x1000 --out small.json
    python -m benchmarks.planner --cases 100000         # rows that each extend the last one by a token: so many levels

Rows share on three levels, in random order: a root, a document per 1000 rows, a part of it per 20 rows, then an end of
their own. Each run is a process of its own. Peak memory is what the kernel counts, the pages of the token file that
were read included; `heap` is without those. Of several runs the median is reported. `per_row_against_first`: time per
row over that of the first case in the same turn, so that a machine that changes its speed counts for little.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np

from batchllm.core import PromptTable, RequestTable, SamplingParams
from batchllm.planner.ordering import OrderName
from batchllm.planner.plan import PlanOptions, arrange, build_plan, draft_plan
from batchllm.planner.plan_file import write_plan
from batchllm.planner.savings import computed_tokens
from batchllm.versions import versions

_RESULTS = Path(__file__).parent / "results"
_VOCABULARY = 32_000
_CHUNK_TOKENS = 1 << 24


def generate(path: Path, rows: int, length: int) -> None:
    """`rows * length` int32."""
    random = np.random.default_rng(1)
    cuts = [length // 5, length // 2 + length // 5, length - length // 10]
    documents, parts = max(1, rows // 1000), max(1, rows // 20)
    root = random.integers(0, _VOCABULARY, cuts[0], dtype=np.int32)
    document = random.integers(0, _VOCABULARY, (documents, cuts[1] - cuts[0]), dtype=np.int32)
    part = random.integers(0, _VOCABULARY, (parts, cuts[2] - cuts[1]), dtype=np.int32)
    step = max(1, _CHUNK_TOKENS // length)
    with path.open("wb") as file:
        for low in range(0, rows, step):
            mine = random.integers(0, parts, min(step, rows - low))
            chunk = np.empty((len(mine), length), dtype=np.int32)
            chunk[:, : cuts[0]] = root
            chunk[:, cuts[0] : cuts[1]] = document[mine % documents]
            chunk[:, cuts[1] : cuts[2]] = part[mine]
            own = (len(mine), length - cuts[2])
            chunk[:, cuts[2] :] = random.integers(0, _VOCABULARY, own, dtype=np.int32)
            file.write(chunk.data)


def measure(path: Path, rows: int, length: int, order: OrderName) -> dict[str, object]:
    """In this process: seconds by stage, peak memory, what is saved."""
    tokens = np.memmap(path, np.int32, mode="r")
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    same = np.zeros(rows, dtype=np.int32)
    prompts = PromptTable(tokens, offsets, (SamplingParams(),), same, {})
    requests = RequestTable(np.arange(rows), same, np.zeros((rows, 2), dtype=np.uint64))
    np.bitwise_xor.reduce(tokens)  # in the page cache, as after tokenising
    clock, cpu = time.perf_counter(), time.process_time()
    draft = draft_plan(prompts, requests, np.ones(rows, dtype=bool), PlanOptions())
    drafted = time.perf_counter()
    plan = arrange(draft, order)
    planned, planned_cpu = time.perf_counter(), time.process_time()
    peak, heap = _peak(), _now("RssAnon")
    write_plan(plan, path.with_name("plan.parquet"))
    written = time.perf_counter()
    savings = computed_tokens(draft)
    return {
        "rows": rows,
        "tokens_per_row": length,
        "seconds": round(planned - clock, 2),
        "cpu_seconds": round(planned_cpu - cpu, 2),
        "seconds_of_tree": round(drafted - clock, 2),
        "seconds_of_order": round(planned - drafted, 2),
        "seconds_of_writing": round(written - planned, 2),
        "seconds_of_comparing_groupings": round(time.perf_counter() - written, 2),
        "microseconds_per_row": round(1e6 * (planned - clock) / rows, 3),
        "peak_gib": round(peak / 2**30, 3),
        "heap_gib": round(heap / 2**30, 3),
        "shared_nodes": plan.stats.shared_nodes,
        "saved": {
            name: round(savings.saved_share(getattr(savings, name)), 5)
            for name in ("first_level", "published_rule", "best_single_level", "kept_nodes", "optimum")
        },
    }


def measure_nested(rows: int) -> dict[str, object]:
    """Row i is i + 1 times the same token: as tokens 20 GB for 100,000 rows, so they are memory that is never written,
    of which all pages are one page of zeros."""
    length = np.arange(1, rows + 1)
    offsets = np.append(0, np.cumsum(length)).astype(np.int64)
    zeros = mmap.mmap(
        -1, int(offsets[-1]) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
    )
    same = np.zeros(rows, dtype=np.int32)
    prompts = PromptTable(np.frombuffer(zeros, np.int32), offsets, (SamplingParams(),), same, {})
    requests = RequestTable(np.arange(rows), same, np.zeros((rows, 2), dtype=np.uint64))
    before, clock, cpu = _peak(), time.perf_counter(), time.process_time()
    plan = build_plan(prompts, requests, np.ones(rows, dtype=bool), PlanOptions(min_shared_tokens=1))
    return {
        "rows": rows,
        "tokens": int(offsets[-1]),
        "levels": plan.stats.depth,
        "seconds": round(time.perf_counter() - clock, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_gib": round((_peak() - before) / 2**30, 3),
        "planned_tokens": plan.stats.planned_tokens,
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now(kind: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    return 0


def token_file(case: str, folder: Path) -> Path:
    """Generated, unless it is there."""
    rows, length = map(int, case.split("x"))
    path = folder / case / "tokens"
    if not path.exists() or path.stat().st_size != 4 * rows * length:
        path.parent.mkdir(parents=True, exist_ok=True)
        generate(path, rows, length)
    return path


def measure_apart(case: str, file: Path | None, order: str) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.planner", "--cases", case, "--order", order]
    done = subprocess.run(
        [*command, "--measure-file", str(file or os.devnull)], capture_output=True, text=True
    )
    if done.returncode:
        raise click.ClickException(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    click.echo(f"{case}: {found['seconds']} s")
    return found


def summed_up(runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median time, and what all of them took. `first`: of the first case, in the same turns."""
    median = sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]
    against = [_per_row(run) / max(1e-9, _per_row(other)) for run, other in zip(runs, first)]
    return {
        **median,
        "seconds_of_runs": [run["seconds"] for run in runs],
        "per_row_against_first": round(statistics.median(against), 3),
    }


def _per_row(run: dict[str, Any]) -> float:
    return float(run["seconds"]) / int(run["rows"])


@click.command()
@click.option(
    "--cases", default="100000x1000,1000000x1000,10000000x100", help="ROWSxTOKENS or LEVELS, comma-separated"
)
@click.option("--order", default="decode_ratio")
@click.option("--repeats", type=click.IntRange(min=1), default=1)
@click.option("--scratch", type=click.Path(path_type=Path), default=None, help="keeps the token files")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-planner.json"
)
@click.option("--measure-file", type=click.Path(path_type=Path), default=None, hidden=True)
def main(
    cases: str,
    order: OrderName,
    repeats: int,
    scratch: Path | None,
    out: Path | None,
    measure_file: Path | None,
) -> None:
    """Plans every case `repeats` times, all cases in turn."""
    if measure_file is not None:
        rows, *length = map(int, cases.split("x"))
        found = measure(measure_file, rows, length[0], order) if length else measure_nested(rows)
        click.echo(json.dumps(found))
        return
    names = cases.split(",")
    with tempfile.TemporaryDirectory() as folder:
        files = {case: token_file(case, scratch or Path(folder)) if "x" in case else None for case in names}
        turns = [[measure_apart(case, files[case], order) for case in names] for _ in range(repeats)]
    runs = [list(case) for case in zip(*turns)]
    report = {
        "date": date.today().isoformat(),
        "cpus": os.cpu_count(),
        "versions": dict(versions()),
        "cases": [summed_up(case, runs[0]) for case in runs],
    }
    click.echo(json.dumps(report["cases"], indent=2))
    target = out or _RESULTS / f"{report['date']}-planner.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"written to {target}")


if __name__ == "__main__":
    main()
