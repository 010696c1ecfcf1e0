"""The identity of every answer owed: 128 bits over what it is made from, never over where its row stands.

    row digest  = xxh3(configuration, sampling parameters, id, prompt tokens)      a row that has a prompt
                | xxh3("fault", reason, id)                                        a row that has none
    occurrence  = how many earlier rows have the same digest, in input order
    key         = xxh3(row digest, occurrence, sample)

So an answer survives when rows are added, removed or reordered, and does not survive when anything that could
change its text changes. `n` is not part of it: asking for more samples keeps those already there. The random
numbers of a request are keyed by its key, so the same row is given the same text in whatever order rows come.

Rows of one job whose digests are equal are compared with each other. Should two of them differ, or two requests have
one key, all keys of the job are made with BLAKE2 instead, of which no collision is known. What a row of an earlier run
said is not kept: there, a key of 128 bits stands for it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from batchllm.core import IntArray, PromptTable, RequestTable, SamplingParams
from batchllm.dataset.row_ids import plain_ids

_DEFAULTS = asdict(SamplingParams())
_EARLIER = "max_tokens temperature top_p top_k min_p n seed stop stop_token_ids ignore_eos logprobs".split()
_LATER = sorted(set(_DEFAULTS) - set(_EARLIER))

KeyArray = NDArray[np.uint64]  # [n, 2]
Digest = Callable[[bytes], bytes]  # 16 bytes

_ID_CHUNK_ROWS = 65_536


def make_requests(prompts: PromptTable, ids: pa.ChunkedArray | None, configuration: bytes) -> RequestTable:
    """The requests of a job, in input order: `n` for every row.

    `ids` is the id column, one value per row, if the job names one. `configuration` is everything outside the
    rows that decides the text: the model's fingerprint, its number format and the like.
    """
    if ids is not None and len(ids) != prompts.num_rows:
        raise AssertionError(f"{len(ids)} ids for {prompts.num_rows} rows")
    heads = [_framed(configuration, sampling_identity(params)) for params in prompts.params]
    contents = _Contents(prompts, ids, heads)
    digests = _digests(_Contents(prompts, ids, [xxh3_128_digest(head) for head in heads]), xxh3_128_digest)
    requests = _request_table(prompts, digests, xxh3_128_digest)
    if _are_confused(digests, contents) or not _are_unique(requests.key):
        requests = _request_table(prompts, _digests(contents, _blake2), _blake2)
    return requests


def content_keys(prompts: PromptTable, configuration: bytes) -> KeyArray:
    """[rows, 2] what a greedy answer is made from: configuration, parameters and prompt, whatever the row's id."""
    heads = [_framed(configuration, sampling_identity(params)) for params in prompts.params]
    return _digests(_Contents(prompts, None, [xxh3_128_digest(head) for head in heads]), xxh3_128_digest)


def _request_table(prompts: PromptTable, digests: KeyArray, digest: Digest) -> RequestTable:
    occurrence = rank_among_equals(digests)
    samples_of = np.array([p.n for p in prompts.params], dtype=np.int64)
    per_row = samples_of[prompts.params_of] if prompts.num_rows else np.zeros(0, dtype=np.int64)
    row = np.repeat(np.arange(prompts.num_rows, dtype=np.int64), per_row)
    first = np.cumsum(per_row) - per_row
    sample = (np.arange(len(row)) - first[row]).astype(np.int32)
    key = _request_keys(digests[row], occurrence[row], sample, digest)
    return RequestTable(row=row, sample=sample, key=key)


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
    # Parameters that came later count where they are used, so answers from before they existed stay.
    later = {name: getattr(params, name) for name in _LATER if getattr(params, name) != _DEFAULTS[name]}
    return json.dumps(fields | later).encode()


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


class _Contents:
    """The bytes that tell rows apart. `heads`, one for each parameter set, must differ and none begin with another."""

    def __init__(self, prompts: PromptTable, ids: pa.ChunkedArray | None, heads: Sequence[bytes]) -> None:
        self._prompts, self._ids, self._heads = prompts, ids, heads
        self._tokens = np.ascontiguousarray(prompts.tokens).view(np.uint8).data

    def of(self, row: int) -> bytes:
        """Of one row."""
        row_id = b"" if self._ids is None else _id_bytes(*plain_ids(self._ids.slice(row, 1)))
        return self._content(row, row_id)

    def __iter__(self) -> Iterator[bytes]:
        """Of all rows, in order; faster than one by one."""
        for start in range(0, self._prompts.num_rows, _ID_CHUNK_ROWS):
            count = min(_ID_CHUNK_ROWS, self._prompts.num_rows - start)
            ids = None if self._ids is None else plain_ids(self._ids.slice(start, count))
            for number in range(count):
                yield self._content(start + number, b"" if ids is None else _id_bytes(ids[number]))

    def _content(self, row: int, row_id: bytes) -> bytes:
        prompts = self._prompts
        if row in prompts.faults:
            return _framed(b"fault", prompts.faults[row].encode(errors="replace"), row_id)
        start, end = 4 * int(prompts.offsets[row]), 4 * int(prompts.offsets[row + 1])
        head = self._heads[prompts.params_of[row]]
        return b"".join((head, struct.pack("<q", len(row_id)), row_id, self._tokens[start:end]))


def _digests(contents: _Contents, digest: Digest) -> KeyArray:
    return _as_keys(b"".join(digest(content) for content in contents))


def _are_confused(digests: KeyArray, contents: _Contents) -> bool:
    """Whether two rows with the same digest have different contents."""
    order, starts = _equal_runs(digests)
    repeated = np.flatnonzero(starts < np.arange(len(order)))
    pairs = zip(order[repeated].tolist(), order[starts[repeated]].tolist())
    return any(contents.of(row) != contents.of(first) for row, first in pairs)


def _are_unique(keys: KeyArray) -> bool:
    _, starts = _equal_runs(keys)
    return bool((starts == np.arange(len(keys))).all())


def _blake2(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


def _request_keys(
    digests: KeyArray, occurrence: IntArray, sample: NDArray[np.int32], digest: Digest
) -> KeyArray:
    parts = np.empty((len(digests), 4), dtype="<u8")
    parts[:, :2] = digests
    parts[:, 2] = occurrence
    parts[:, 3] = sample
    raw = parts.tobytes()
    return _as_keys(b"".join(digest(raw[i : i + 32]) for i in range(0, len(raw), 32)))


def _id_bytes(value: object) -> bytes:
    """What an id, as `plain_ids` gives it, adds to its row's content."""
    if isinstance(value, str):
        return b"t" + value.encode(errors="surrogatepass")
    if isinstance(value, bytes):
        return b"b" + value
    return b"v" + repr(value).encode(errors="surrogatepass")


def _framed(*fields: bytes) -> bytes:
    """The fields with their lengths before them, so that no two lists of fields give the same bytes."""
    return b"".join(struct.pack("<q", len(field)) + field for field in fields)


def _as_keys(raw: bytes) -> KeyArray:
    return np.frombuffer(raw, dtype=">u8").astype(np.uint64).reshape(-1, 2)
