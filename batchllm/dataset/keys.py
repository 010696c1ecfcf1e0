"""The identity of every answer owed: 128 bits over what it is made from, never over where its row stands.

    row digest  = xxh3(configuration, sampling parameters, id, prompt tokens)      a row that has a prompt
                | xxh3("fault", reason, id)                                        a row that has none
    occurrence  = how many earlier rows have the same digest, in input order
    key         = xxh3(row digest, occurrence, sample)

So an answer survives when rows are added, removed or reordered, and does not survive when anything that could
change its text changes. `n` is not part of it: asking for more samples keeps those already there. The random
numbers of a request are keyed by its key, so the same row is given the same text in whatever order rows come.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from batchllm.core import IntArray, PromptTable, RequestTable, SamplingParams

KeyArray = NDArray[np.uint64]  # [n, 2]

_ID_CHUNK_ROWS = 65_536


def make_requests(prompts: PromptTable, ids: pa.ChunkedArray | None, configuration: bytes) -> RequestTable:
    """The requests of a job, in input order: `n` for every row.

    `ids` is the id column, one value per row, if the job names one. `configuration` is everything outside the
    rows that decides the text: the model's fingerprint, its number format and the like.
    """
    if ids is not None and len(ids) != prompts.num_rows:
        raise AssertionError(f"{len(ids)} ids for {prompts.num_rows} rows")
    digests = _row_digests(prompts, ids, configuration)
    occurrence = rank_among_equals(digests)
    samples_of = np.array([p.n for p in prompts.params], dtype=np.int64)
    per_row = samples_of[prompts.params_of] if prompts.num_rows else np.zeros(0, dtype=np.int64)
    row = np.repeat(np.arange(prompts.num_rows, dtype=np.int64), per_row)
    first = np.cumsum(per_row) - per_row
    sample = (np.arange(len(row)) - first[row]).astype(np.int32)
    return RequestTable(row=row, sample=sample, key=_request_keys(digests[row], occurrence[row], sample))


def sampling_identity(params: SamplingParams) -> bytes:
    """The parameters in a form that is equal exactly when they ask for the same tokens, whatever `n` is."""
    greedy = params.greedy
    fields = {
        "max_tokens": params.max_tokens,
        "temperature": float(params.temperature),
        "top_p": None if greedy else float(params.top_p),
        "top_k": None if greedy else params.top_k,
        "min_p": None if greedy else float(params.min_p),
        "seed": None if greedy else params.seed,
        "stop": list(params.stop),
        "stop_token_ids": sorted(set(params.stop_token_ids)),
        "ignore_eos": params.ignore_eos,
        "logprobs": params.logprobs,
    }
    return json.dumps(fields).encode()


def rank_among_equals(keys: KeyArray) -> IntArray:
    """For each key, how many equal ones stand before it."""
    order, starts = _equal_runs(keys)
    rank = np.empty(len(keys), dtype=np.int64)
    rank[order] = np.arange(len(keys)) - starts
    return rank


def match_keys(wanted: KeyArray, stored: KeyArray) -> IntArray:
    """For each stored key, the index of the equal wanted key, or -1. The wanted keys are unique."""
    order, starts = _equal_runs(np.concatenate([wanted, stored]))
    head = np.empty(len(order), dtype=np.int64)
    head[order] = order[starts]  # the sort is stable: a wanted key comes before the stored ones equal to it
    found = head[len(wanted) :]
    return np.where(found < len(wanted), found, -1)


def _equal_runs(keys: KeyArray) -> tuple[IntArray, IntArray]:
    """A stable order that brings equal keys together, and for each place in it the start of its run of equals."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    opens = np.ones(len(keys), dtype=bool)
    opens[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    starts = np.maximum.accumulate(np.where(opens, np.arange(len(keys)), 0))
    return order, starts


def _row_digests(prompts: PromptTable, ids: pa.ChunkedArray | None, configuration: bytes) -> KeyArray:
    heads = [xxh3_128_digest(_framed(configuration, sampling_identity(p))) for p in prompts.params]
    tokens = np.ascontiguousarray(prompts.tokens).view(np.uint8).data
    out = bytearray()
    position = 0
    for row_id in _id_bytes(ids, prompts.num_rows):
        row, position = position, position + 1
        if row in prompts.faults:
            out += xxh3_128_digest(_framed(b"fault", prompts.faults[row].encode(errors="replace"), row_id))
            continue
        start, end = 4 * int(prompts.offsets[row]), 4 * int(prompts.offsets[row + 1])
        head = heads[prompts.params_of[row]]
        out += xxh3_128_digest(b"".join((head, struct.pack("<q", len(row_id)), row_id, tokens[start:end])))
    return _as_keys(bytes(out))


def _request_keys(digests: KeyArray, occurrence: IntArray, sample: NDArray[np.int32]) -> KeyArray:
    parts = np.empty((len(digests), 4), dtype="<u8")
    parts[:, :2] = digests
    parts[:, 2] = occurrence
    parts[:, 3] = sample
    raw = parts.tobytes()
    return _as_keys(b"".join(xxh3_128_digest(raw[i : i + 32]) for i in range(0, len(raw), 32)))


def _id_bytes(ids: pa.ChunkedArray | None, num_rows: int) -> Iterator[bytes]:
    """One byte string per row: what its id adds to its digest. Without an id column, nothing."""
    if ids is None:
        for _ in range(num_rows):
            yield b""
        return
    for start in range(0, num_rows, _ID_CHUNK_ROWS):
        for value in ids.slice(start, _ID_CHUNK_ROWS).to_pylist():
            if isinstance(value, str):
                yield b"t" + value.encode(errors="surrogatepass")
            elif isinstance(value, bytes):
                yield b"b" + value
            else:
                yield b"v" + repr(value).encode(errors="surrogatepass")


def _framed(*fields: bytes) -> bytes:
    """The fields with their lengths before them, so that no two lists of fields give the same bytes."""
    return b"".join(struct.pack("<q", len(field)) + field for field in fields)


def _as_keys(raw: bytes) -> KeyArray:
    return np.frombuffer(raw, dtype=">u8").astype(np.uint64).reshape(-1, 2)
