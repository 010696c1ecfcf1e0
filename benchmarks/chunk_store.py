"""A store of many chunks: put, open, look up, read.

    python -m benchmarks.chunk_store --chunks 100000 --folder /somewhere/with/space

Seconds are this process's own CPU time and, beside it, wall-clock time. A lookup hashes the tokens, finds the
variants in the index, opens the file, checks its header and compares the tokens; reading a layer checks its checksum.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import click
import numpy as np

from batchllm.chunkcache.chunk_file import ChunkHeader, ChunkStatistics, EncodedLayer
from batchllm.chunkcache.identity import chunk_context, chunk_key
from batchllm.chunkcache.store import ChunkStore

_RESULTS = Path(__file__).parent / "results"
_MODEL = b"a model's digest"
_LAYERS, _TOKENS = 4, 64


@contextmanager
def timed(report: dict[str, float], name: str, count: int = 1, unit: float = 1.0) -> Iterator[None]:
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    report[f"{name}_cpu"] = round((time.process_time() - cpu) / count * unit, 3)
    report[f"{name}_wall"] = round((time.perf_counter() - wall) / count * unit, 3)
    click.echo(f"{name}: {report[f'{name}_cpu']} CPU, {report[f'{name}_wall']} wall")


def tokens_of(number: int) -> np.ndarray:
    tokens = ((np.arange(_TOKENS) * 7919 + number * 104_729) % 32_000).astype(np.int32)
    tokens[0] = number // 32_000  # the others repeat after 32,000 chunks
    return tokens


def make_chunk(number: int, layer_bytes: int) -> tuple[ChunkHeader, list[EncodedLayer]]:
    tokens = tokens_of(number)
    statistics = ChunkStatistics(
        np.zeros(_TOKENS, np.float32), np.zeros(_TOKENS, np.float32), np.zeros(0, np.float32), 0.1, 0.2
    )
    context = chunk_context(tokens[:4], [])
    header = ChunkHeader(_MODEL, chunk_key(_MODEL, tokens), tokens, context, statistics, "bf16", "bfloat16")
    data = np.full(layer_bytes, number % 251, dtype=np.uint8)
    return header, [EncodedLayer(2, 32, 32, data)] * _LAYERS


@click.command()
@click.option("--chunks", default=100_000)
@click.option("--layer-bytes", default=2048, help="of each of 4 layers")
@click.option("--folder", type=click.Path(path_type=Path), default=None, help="where the store is made")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-chunk-store.json"
)
def main(chunks: int, layer_bytes: int, folder: Path | None, out: Path | None) -> None:
    """Prints times."""
    place = Path(tempfile.mkdtemp(dir=folder))
    report: dict[str, float] = {"chunks": chunks, "layer_bytes": layer_bytes}
    try:
        with ChunkStore(place / "store", _MODEL, write=True, durable=False) as store:
            with timed(report, "put_us", chunks, 1e6):
                for number in range(chunks):
                    assert store.put(*make_chunk(number, layer_bytes))
            report["disk_bytes"] = store.used_bytes()
        with timed(report, "open_s"):
            store = ChunkStore(place / "store", _MODEL)
        assert len(store) == chunks
        rng = np.random.default_rng(0)
        wanted = [tokens_of(int(number)) for number in rng.integers(0, chunks, 5000)]
        with timed(report, "find_us", len(wanted), 1e6):
            for tokens in wanted:
                store.find(tokens)
        with timed(report, "find_and_open_us", len(wanted), 1e6):
            files = [store.open(store.find(tokens)[0].name, tokens) for tokens in wanted]
        with timed(report, "read_layer_us", len(wanted), 1e6):
            for file in files:
                assert file is not None
                file.layer(2)
        del files, file
        with timed(report, "open_for_writing_s"):
            ChunkStore(place / "store", _MODEL, write=True).close()
        (place / "store" / "index").unlink()
        with timed(report, "open_without_index_s"):
            ChunkStore(place / "store", _MODEL)
    finally:
        shutil.rmtree(place)
    target = out or _RESULTS / f"{date.today().isoformat()}-chunk-store.json"
    target.write_text(json.dumps({"date": date.today().isoformat(), **report}, indent=2) + "\n")
    click.echo(f"written to {target}")


if __name__ == "__main__":
    main()
