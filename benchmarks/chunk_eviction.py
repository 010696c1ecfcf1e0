"""What caches of chunks load on real access sequences: known next use against LRU, LFU and Cache-Craft's score.

    python -m benchmarks.chunk_eviction ../shared/data

MuSiQue: 150 questions with 10 passages each, in the order of the file; a passage's size is its number of tokens.
Mooncake: the blocks of 512 tokens of a conversation trace, the last block of a prompt partial.

The bound is exact for chunks that may be kept in part, so no policy loads less. Cache-Craft's score needs the share
of tokens that each use recomputes (CFO); for MuSiQue it is estimated from which passages stood before, each counting
the same, with CCI = 1. Mooncake's blocks always follow the same blocks: nothing is recomputed, and the score is LFU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np

from batchllm.core import IntArray
from batchllm.planner.accesses import AccessSequence, FloatArray, accesses_by_bytes
from batchllm.planner.eviction import (
    EvictionPolicy,
    KnownNextUse,
    LeastRecentlyUsed,
    cache_craft_score,
    least_frequently_used,
)
from batchllm.planner.eviction_simulator import simulate_cache
from batchllm.planner.memory_prices import fewest_loaded_bytes, memory_prices

BLOCK = 512
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)
_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Accesses:
    by_bytes: AccessSequence
    fix_share: FloatArray  # [accesses] CFO of each use

    @property
    def by_work(self) -> AccessSequence:
        """A load costs what computing the chunk costs: attention makes long chunks dearer per token."""
        size = self.by_bytes.bytes.astype(np.float64)
        return AccessSequence(
            self.by_bytes.item, self.by_bytes.bytes, (size + size**2 / 2000)[self.by_bytes.item]
        )


def musique_accesses(rows: Sequence[dict[str, Any]], count_tokens: Callable[[str], int]) -> Accesses:
    numbers: dict[str, int] = {}
    sizes: list[int] = []
    requests = []
    for row in rows:
        chunks = []
        for passage in row["ctxs"]:
            if passage["text"] not in numbers:
                numbers[passage["text"]] = len(numbers)
                sizes.append(max(1, count_tokens(passage["text"])))
            chunks.append(numbers[passage["text"]])
        requests.append(chunks)
    return _accesses(requests, np.array(sizes, dtype=np.int64), _fix_shares(requests))


def mooncake_accesses(path: Path, limit: int | None = None) -> Accesses:
    rows = [json.loads(line) for line in path.read_text().splitlines()[:limit]]
    names = np.concatenate([row["hash_ids"] for row in rows])
    _, numbers = np.unique(names, return_inverse=True)
    sizes = np.zeros(int(numbers.max()) + 1, dtype=np.int64)
    requests, first = [], 0
    for row in rows:
        chunks = numbers[first : first + len(row["hash_ids"])]
        first += len(chunks)
        last = row["input_length"] - BLOCK * (len(chunks) - 1)
        np.maximum.at(sizes, chunks, np.append(np.full(len(chunks) - 1, BLOCK), last))
        requests.append(chunks.tolist())
    return _accesses(requests, sizes, np.zeros(len(names)))


def _accesses(requests: Sequence[Sequence[int]], sizes: IntArray, fix_share: FloatArray) -> Accesses:
    item = np.array([chunk for chunks in requests for chunk in chunks], dtype=np.int64)
    return Accesses(accesses_by_bytes(item, sizes), fix_share)


def _fix_shares(requests: Sequence[Sequence[int]]) -> FloatArray:
    """1 - overlap * (1 - order penalty) with what stood before when the chunk was first computed."""
    first: dict[int, list[int]] = {}
    shares = []
    for chunks in requests:
        for place, chunk in enumerate(chunks):
            before = list(chunks[:place])
            stored = first.setdefault(chunk, before)
            common = [other for other in stored if other in before]
            overlap = len(common) / len(stored) if stored else 1.0
            places = [before.index(other) for other in common]
            pairs = [(a, b) for i, a in enumerate(places) for b in places[i + 1 :]]
            penalty = sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0
            shares.append(1 - overlap * (1 - penalty))
    return np.array(shares)


def compare(accesses: Accesses, share: float) -> dict[str, Any]:
    """Loaded bytes of each policy over the bound, with a cache of this share of all distinct bytes."""
    sequence = accesses.by_bytes
    capacity = int(sequence.distinct_bytes * share)
    bound = fewest_loaded_bytes(sequence, capacity)
    policies: dict[str, EvictionPolicy] = {
        "known next use": KnownNextUse(sequence),
        "LRU": LeastRecentlyUsed(),
        "LFU": least_frequently_used(len(sequence)),
        "Cache-Craft": cache_craft_score(accesses.fix_share),
    }
    row: dict[str, Any] = {
        "cache": share,
        "capacity": capacity,
        "bound": bound,
        "distinct": sequence.distinct_bytes,
    }
    for name, policy in policies.items():
        found = simulate_cache(sequence, policy, capacity)
        assert found.peak_bytes <= capacity
        row[name] = found.loaded_bytes
    equal = accesses_by_bytes(sequence.item, np.ones(len(sequence.bytes), dtype=np.int64))
    slots = int(len(np.unique(equal.item)) * share)
    row["equal sizes"] = simulate_cache(equal, KnownNextUse(equal), slots).loaded_bytes
    row["equal sizes, optimum"] = fewest_loaded_bytes(equal, slots)
    row["equal sizes, LRU"] = simulate_cache(equal, LeastRecentlyUsed(), slots).loaded_bytes
    work = accesses.by_work
    farthest = simulate_cache(work, KnownNextUse(work), capacity)
    prices = memory_prices(work, capacity, farthest.cost)
    priced = simulate_cache(work, KnownNextUse(work, prices.price), capacity)
    row["work, known next use"] = priced.cost / prices.least_cost
    row["work, LRU"] = simulate_cache(work, LeastRecentlyUsed(), capacity).cost / prices.least_cost
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| cache | bound, of distinct bytes | known next use | LRU | LFU | Cache-Craft | equal sizes: known next use / "
        "optimum, LRU | by compute: known next use, LRU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        over = {name: row[name] / row["bound"] for name in ("known next use", "LRU", "LFU", "Cache-Craft")}
        equal, optimum = row["equal sizes"], row["equal sizes, optimum"]
        lines.append(
            f"| {row['cache']:.1%} | {row['bound'] / row['distinct']:.3f} | {over['known next use']:.4f} | "
            f"{over['LRU']:.3f} | {over['LFU']:.3f} | {over['Cache-Craft']:.3f} | "
            f"{equal / optimum:.4f}, {row['equal sizes, LRU'] / optimum:.3f} | "
            f"{row['work, known next use']:.4f}, {row['work, LRU']:.3f} |"
        )
    return "\n".join(lines)


@click.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-chunk-eviction.json"
)
def main(data: Path, out: Path | None) -> None:
    """Prints a table for each sequence."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(data / "tokenizers" / "phi-3-mini" / "tokenizer.json"))
    questions = json.loads((data / "cacheblend" / "musique_s.json").read_text())
    sequences = {
        "MuSiQue": musique_accesses(questions, lambda text: len(tokenizer.encode(text).ids)),
        "Mooncake": mooncake_accesses(data / "mooncake" / "conversation_trace.jsonl"),
    }
    report: dict[str, Any] = {"date": date.today().isoformat()}
    for name, accesses in sequences.items():
        rows = [compare(accesses, share) for share in SHARES]
        click.echo(f"{name}: {len(accesses.by_bytes):,} accesses; loaded bytes over the bound\n{table(rows)}")
        report[name] = {"accesses": len(accesses.by_bytes), "policies": rows}
    target = out or _RESULTS / f"{report['date']}-chunk-eviction.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"written to {target}")


if __name__ == "__main__":
    main()
