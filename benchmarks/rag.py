"""A RAG job on this machine: stored chunks against our own prefix caching, and against vLLM's CPU build.

    python -m benchmarks.rag --pairs 3 --engines vllm --trace trace.jsonl

Rows show a few passages of a corpus (100 to 300 tokens each) in an order of their own, popular ones more often (Zipf),
so prefixes are hardly shared. Before, the passages were shuffled and dealt into other prompts, and computed there: no
row finds them in the order or company they were computed in. Prompts are token ids; outputs have a fixed length and are
greedy. `prefix` is BatchLLM without a store, which computes every shared prefix once; `repair` and `naive` place stored
passages. Runs alternate; all begin with an empty KV pool, and the store is on disk. What making the store took is
reported beside them; with `--store` it is kept for the next call. With `--trace` what the loader and the model did is
written as JSON lines (see `load_overlap`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch

from batchllm.chunk_precompute import Precompute
from batchllm.chunk_reuse import ChunkReuse
from batchllm.chunkcache.codecs import CODEC_NAMES, codec_named
from batchllm.chunkcache.key_rotation import find_rotation
from batchllm.chunkcache.loader import LoadEvent
from batchllm.chunkcache.lookup import ChunkLookup
from batchllm.chunkcache.store import ChunkStore
from batchllm.core import ChunkTable, IntArray, PromptTable, RequestTable, SamplingParams
from batchllm.executor.engine import Engine, EngineOptions
from batchllm.executor.model import ModelRunner
from batchllm.executor.ready_model import load_ready_model
from batchllm.executor.stopping import StopRules
from batchllm.job import ChunksSpec
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.report.progress import Progress
from batchllm.reuse_quality import stored_chunks_for
from benchmarks import load_overlap
from benchmarks.engines import Interpreters, Workers, save_workload
from benchmarks.model import kv_bytes_per_token, make_model
from benchmarks.worker import Settings
from benchmarks.workloads import KV_BYTES, Workload

_RESULTS = Path(__file__).parent / "results"
_IDENTITY = b"benchmark model."
_LEAD, _QUESTION = 32, 48  # tokens
_STEP_TOKENS = 2048
MODES = ("prefix", "repair", "naive")


@dataclass(frozen=True)
class Rag:
    """Prompts, and where in them the passages are."""

    prompts: list[list[int]]
    chunks: ChunkTable


def make_corpus(passages: int, tokens: int, seed: int) -> list[IntArray]:
    """Passages of `tokens` tokens on average, half as many to one and a half times as many."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 500, size) for size in rng.integers(tokens // 2, tokens * 3 // 2 + 1, passages)]


def ask(corpus: list[IntArray], rows: int, shown: int, seed: int) -> Rag:
    """Rows of a lead, `shown` of the passages and a question each."""
    rng = np.random.default_rng(seed)
    popular = 1 / np.arange(1, len(corpus) + 1)
    return _rag(
        corpus, [rng.choice(len(corpus), shown, False, popular / popular.sum()) for _ in range(rows)], seed
    )


def deal(corpus: list[IntArray], contexts: int, shown: int, seed: int) -> Rag:
    """Prompts in which every passage stands in so many contexts."""
    rng = np.random.default_rng(seed)
    hands = [
        order[low : low + shown]
        for order in (rng.permutation(len(corpus)) for _ in range(contexts))
        for low in range(0, len(corpus), shown)
    ]
    return _rag(corpus, hands, seed)


def _rag(corpus: list[IntArray], shown: Sequence[IntArray], seed: int) -> Rag:
    lead = np.random.default_rng(0).integers(5, 500, _LEAD)
    rng = np.random.default_rng([seed, 1])
    prompts, ptr, begins, ends = [], [0], [], []
    for chosen in shown:
        passages = [corpus[number] for number in chosen]
        end = _LEAD + np.cumsum([len(passage) for passage in passages])
        begins += [_LEAD, *end[:-1].tolist()]
        ends += end.tolist()
        ptr.append(len(ends))
        question = rng.integers(5, 500, _QUESTION)
        prompts.append(np.concatenate([lead, *passages, question]).tolist())
    return Rag(prompts, ChunkTable(np.array(ptr), np.array(begins), np.array(ends)))


def _prompt_table(prompts: list[list[int]], max_tokens: int) -> PromptTable:
    offsets = np.cumsum([0, *map(len, prompts)]).astype(np.int64)
    tokens = np.concatenate([np.array(prompt, dtype=np.int32) for prompt in prompts])
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return PromptTable(tokens, offsets, (params,), np.zeros(len(prompts), np.int32), {})


class Ours:
    """BatchLLM on one model and one set of rows."""

    def __init__(self, model: ModelRunner, asked: Rag, max_tokens: int, place: Path, share: float):
        self.model, self.chunks, self.place, self.share = model, asked.chunks, place, share
        self.prompts = _prompt_table(asked.prompts, max_tokens)
        count = len(asked.prompts)
        keys = np.random.default_rng(0).integers(0, 2**63, (count, 2)).astype(np.uint64)
        self.requests = RequestTable(np.arange(count), np.zeros(count, np.int32), keys)
        self.rotation = find_rotation(model)

    def precompute(self, dealt: Rag, contexts: int) -> dict[str, float]:
        """Makes the store, unless it is there; what that took."""
        notes = self.place.with_suffix(".json")
        if notes.exists():
            found: dict[str, float] = json.loads(notes.read_text())
            return found
        started, cpu = time.perf_counter(), time.process_time()
        with ChunkStore(self.place, _IDENTITY, write=True, durable=False) as store:
            codec = codec_named("raw", self.model.dtype)
            prompts = _prompt_table(dealt.prompts, 1)
            work = Precompute(self.model, store, codec, prompts, dealt.chunks, 1, contexts)
            made = work.run(Progress(quiet=True))
            figures = {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu,
                "threads": torch.get_num_threads(),
                "contexts": contexts,
                "tokens": made.tokens_computed,
                "chunks": made.chunks,
                "bytes": store.used_bytes(),
            }
        notes.write_text(json.dumps(figures))
        return figures

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
@click.option("--rows", default=60)
@click.option("--passages", default=48)
@click.option("--passage-tokens", default=200, help="on average")
@click.option("--shown", default=5, help="passages of a row")
@click.option("--output-tokens", default=24)
@click.option("--share", default=0.2, help="of reused tokens that `repair` computes again")
@click.option("--contexts", default=4, help="that each passage is precomputed in")
@click.option("--pairs", default=3, help="runs of each")
@click.option("--modes", default=",".join(MODES))
@click.option("--engines", default="", help="vllm, or nothing")
@click.option("--model", "model_name", default="llama-168m")
@click.option("--vllm-python", envvar="BATCHLLM_VLLM_PYTHON", default=None)
@click.option("--store", type=click.Path(path_type=Path), default=None, help="kept for the next call")
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
    contexts: int,
    pairs: int,
    modes: str,
    engines: str,
    model_name: str,
    vllm_python: str | None,
    store: Path | None,
    trace: Path | None,
    out: Path | None,
) -> None:
    """Prints seconds, and throughput against prefix caching."""
    corpus = make_corpus(passages, passage_tokens, seed=0)
    asked = ask(corpus, rows, shown, seed=1)
    workload = Workload("rag", asked.prompts, output_tokens, model=model_name)
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "rows": rows,
        "passages": passages,
        "shown": shown,
        "output_tokens": output_tokens,
        "share": share,
        "prompt_tokens": workload.prompt_tokens,
        "threads": torch.get_num_threads(),
        "runs": {},
    }
    events: list[LoadEvent] = []
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        folder = make_model(scratch / "model", model_name)
        model = load_ready_model(str(folder))
        ours = Ours(model, asked, output_tokens, store or scratch / "store", share)
        report["precompute"] = ours.precompute(deal(corpus, contexts, shown, seed=2), contexts)
        click.echo(f"precompute: {report['precompute']}")
        path = save_workload(workload, scratch)
        settings = Settings(str(folder), KV_BYTES, 4096)
        with Workers(Interpreters(vllm=vllm_python), scratch) as workers:
            for _ in range(pairs):
                for mode in filter(None, modes.split(",")):
                    events = [] if mode == "repair" else events
                    found = ours.run(mode, events if mode == "repair" and trace else None)
                    report["runs"].setdefault(mode, []).append(found)
                    click.echo(f"{mode}: {found['seconds']:.2f} s")
                for engine in filter(None, engines.split(",")):
                    other = workers.run(engine, settings, path)
                    report["runs"].setdefault(engine, []).append({"seconds": other.seconds, **other.figures})
                    click.echo(f"{engine}: {other.seconds:.2f} s")
                _write(report, out)  # what there is, should a later run be cut off
    _say(report)
    if trace is not None:
        trace.write_text("".join(json.dumps(event._asdict()) + "\n" for event in events))
        report["loading"] = load_overlap.overlap([event._asdict() for event in events])
    click.echo(f"written to {_write(report, out)}")


def _say(report: dict[str, Any]) -> None:
    seconds = {name: median(run["seconds"] for run in runs) for name, runs in report["runs"].items()}
    for name, runs in report["runs"].items():
        ratios = [
            f"{seconds[other] / seconds[name]:.2f} times {other}"
            for other in ("prefix", "vllm")
            if other in seconds
        ]
        computed = runs[0].get("prompt_tokens_computed", "?")
        click.echo(
            f"{name}: {seconds[name]:.2f} s (median), {', '.join(ratios)}; computed {computed} of "
            f"{report['prompt_tokens']:,} prompt tokens; waited {runs[0].get('wait_seconds', 0.0):.3f} s for the "
            f"loader, which worked {runs[0].get('load_seconds', 0.0):.3f} s"
        )


def _write(report: dict[str, Any], out: Path | None) -> Path:
    target = out or _RESULTS / f"{report['date']}-rag.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    return target


if __name__ == "__main__":
    main()
