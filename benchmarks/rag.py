"""A RAG job on this machine: stored chunks against our own prefix caching, and against vLLM's CPU build.

    python -m benchmarks.rag --pairs 3 --engines vllm

Rows show a few passages of a corpus in an order of their own, popular ones more often (Zipf), so prefixes are hardly
shared. Prompts are token ids; outputs have a fixed length and are greedy. `prefix` is BatchLLM without a store, which
computes every shared prefix once; `repair` and `naive` place stored passages. Runs alternate; all are from an empty KV
pool, the store is on disk. What `batchllm precompute` would take for the corpus is reported beside it. With `--trace`
the work of the loader, and where it was waited for, is written as JSON lines (what, node, layer, begin, end).
"""

from __future__ import annotations

import json
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np

from batchllm.chunk_precompute import Precompute
from batchllm.chunk_reuse import ChunkReuse
from batchllm.chunkcache.codecs import CODEC_NAMES, codec_named
from batchllm.chunkcache.key_rotation import find_rotation
from batchllm.chunkcache.loader import LoadEvent
from batchllm.chunkcache.lookup import ChunkLookup
from batchllm.chunkcache.store import ChunkStore
from batchllm.core import ChunkTable, PromptTable, RequestTable, SamplingParams
from batchllm.executor.engine import Engine, EngineOptions
from batchllm.executor.model import ModelRunner
from batchllm.executor.ready_model import load_ready_model
from batchllm.executor.stopping import StopRules
from batchllm.job import ChunksSpec
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.report.progress import Progress
from batchllm.reuse_quality import stored_chunks_for
from benchmarks.engines import Interpreters, Workers, save_workload
from benchmarks.model import kv_bytes_per_token, make_model
from benchmarks.worker import Settings
from benchmarks.workloads import KV_BYTES, Workload

_RESULTS = Path(__file__).parent / "results"
_IDENTITY = b"benchmark model."
_LEAD, _QUESTION = 32, 48  # tokens
_STEP_TOKENS = 2048
MODES = ("prefix", "repair", "naive")


def make_rows(rows: int, passages: int, tokens: int, shown: int, seed: int) -> tuple[Workload, ChunkTable]:
    """Prompts of a lead, `shown` of the passages and a question each."""
    rng = np.random.default_rng(seed)
    corpus = rng.integers(5, 500, (passages, tokens))
    popular = 1 / np.arange(1, passages + 1)
    lead = rng.integers(5, 500, _LEAD)
    prompts = []
    for _ in range(rows):
        chosen = rng.choice(passages, shown, replace=False, p=popular / popular.sum())
        prompts.append([*lead, *corpus[chosen].ravel(), *rng.integers(5, 500, _QUESTION)])
    begin = _LEAD + np.tile(np.arange(shown) * tokens, rows)
    chunks = ChunkTable(np.arange(rows + 1) * shown, begin, begin + tokens)
    return Workload("rag", [list(map(int, prompt)) for prompt in prompts], 0), chunks


class Ours:
    """BatchLLM on one model and one set of rows."""

    def __init__(self, model: ModelRunner, workload: Workload, chunks: ChunkTable, place: Path, share: float):
        self.model, self.chunks, self.place, self.share = model, chunks, place, share
        params = SamplingParams(max_tokens=workload.max_tokens, ignore_eos=True)
        count = len(workload.prompts)
        offsets = np.cumsum([0, *map(len, workload.prompts)]).astype(np.int64)
        tokens = np.concatenate([np.array(prompt, dtype=np.int32) for prompt in workload.prompts])
        self.prompts = PromptTable(tokens, offsets, (params,), np.zeros(count, np.int32), {})
        keys = np.random.default_rng(0).integers(0, 2**63, (count, 2)).astype(np.uint64)
        self.requests = RequestTable(np.arange(count), np.zeros(count, np.int32), keys)
        self.rotation = find_rotation(model)

    def precompute(self) -> dict[str, float]:
        started = time.perf_counter()
        with ChunkStore(self.place, _IDENTITY, write=True, durable=False) as store:
            codec = codec_named("raw", self.model.dtype)
            work = Precompute(self.model, store, codec, self.prompts, self.chunks, 1, 1)
            found = work.run(Progress(quiet=True))
            return {
                "seconds": time.perf_counter() - started,
                "tokens": found.tokens_computed,
                "chunks": found.chunks,
                "bytes": store.used_bytes(),
            }

    def run(self, mode: str, trace: list[LoadEvent] | None) -> dict[str, Any]:
        """Seconds from the rows to the last token; planning included, loading the model not."""
        started = time.perf_counter()
        reuse = None if mode == "prefix" else self._reuse(mode, trace)
        plan = build_plan(self.prompts, self.requests, np.ones(len(self.requests), dtype=bool), PlanOptions())
        kv_tokens = KV_BYTES // kv_bytes_per_token("llama-168m")
        options = EngineOptions(min(kv_tokens, 200_000), _STEP_TOKENS)
        with stored_chunks_for(reuse, plan) as stored:
            engine = Engine(
                self.model,
                plan,
                self.prompts,
                self.requests,
                StopRules(frozenset(), None),
                options,
                stored=stored,
            )
            tokens = sum(len(result.tokens) for finished in engine.run() for result in finished)
        seconds = time.perf_counter() - started
        found: dict[str, Any] = {"seconds": seconds, "output_tokens": tokens, "steps": engine.stats.steps}
        found["prompt_tokens_computed"] = engine.stats.prompt_tokens_computed
        return found | ({} if reuse is None else reuse.figures)

    def _reuse(self, mode: str, trace: list[LoadEvent] | None) -> ChunkReuse:
        store = ChunkStore(self.place, _IDENTITY)
        lookup = ChunkLookup(
            store, self.prompts, self.chunks, exact_only=False, codecs=frozenset(CODEC_NAMES)
        )
        spec = ChunksSpec.model_validate({"column": "passages", "store": self.place, "reuse": mode})
        share = self.share if mode == "repair" else 0.0
        return ChunkReuse(spec, store, self.model, self.prompts, lookup, self.rotation, share, trace=trace)


@click.command()
@click.option("--rows", default=120)
@click.option("--passages", default=150)
@click.option("--passage-tokens", default=256)
@click.option("--shown", default=5, help="passages of a row")
@click.option("--output-tokens", default=16)
@click.option("--share", default=0.15, help="of reused tokens that `repair` computes again")
@click.option("--pairs", default=3, help="runs of each")
@click.option("--engines", default="", help="vllm, or nothing")
@click.option("--model", "model_name", default="llama-168m")
@click.option("--vllm-python", envvar="BATCHLLM_VLLM_PYTHON", default=None)
@click.option(
    "--trace", type=click.Path(path_type=Path), default=None, help="JSON lines of the last repaired run"
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-rag.json")
def main(
    rows: int,
    passages: int,
    passage_tokens: int,
    shown: int,
    output_tokens: int,
    share: float,
    pairs: int,
    engines: str,
    model_name: str,
    vllm_python: str | None,
    trace: Path | None,
    out: Path | None,
) -> None:
    """Prints seconds, and throughput against prefix caching."""
    made, chunks = make_rows(rows, passages, passage_tokens, shown, seed=0)
    workload = Workload("rag", made.prompts, output_tokens, model=model_name)
    report: dict[str, Any] = {"date": date.today().isoformat(), "rows": rows, "runs": {}}
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        folder = make_model(scratch / "model", model_name)
        model = load_ready_model(str(folder))
        ours = Ours(model, workload, chunks, scratch / "store", share)
        report["precompute"] = ours.precompute()
        click.echo(f"precompute: {report['precompute']}")
        path = save_workload(workload, scratch)
        settings = Settings(str(folder), KV_BYTES, 4096)
        events: list[LoadEvent] = []
        with Workers(Interpreters(vllm=vllm_python), scratch) as workers:
            for _ in range(pairs):
                for mode in MODES:
                    events = [] if mode == "repair" else events
                    found = ours.run(mode, events if mode == "repair" else None)
                    report["runs"].setdefault(mode, []).append(found)
                for engine in filter(None, engines.split(",")):
                    other = workers.run(engine, settings, path)
                    report["runs"].setdefault(engine, []).append({"seconds": other.seconds, **other.figures})
    best = {name: min(run["seconds"] for run in runs) for name, runs in report["runs"].items()}
    for name, runs in report["runs"].items():
        computed = runs[0].get("prompt_tokens_computed")
        waited = runs[0].get("wait_seconds", 0.0)
        click.echo(
            f"{name}: {best[name]:.2f} s, {best['prefix'] / best[name]:.2f} times prefix caching; "
            f"computed {computed} of {workload.prompt_tokens:,} prompt tokens; waited {waited:.3f} s, "
            f"loader worked {runs[0].get('load_seconds', 0.0):.3f} s"
        )
    report["prompt_tokens"] = workload.prompt_tokens
    if trace is not None:
        trace.write_text("".join(json.dumps(event._asdict()) + "\n" for event in events))
    target = out or _RESULTS / f"{date.today().isoformat()}-rag.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(f"written to {target}")


if __name__ == "__main__":
    main()
