"""One stored chunk: a file that says what it is and whose every part has a checksum.

    header    fixed fields: sizes, model, key, context, number format, codec
    arrays    tokens, statistics, and for each layer where its KV is and its checksum
    checksum  of header and arrays
    layers    K and V of each layer as the codec wrote them, each layer on a multiple of 64 bytes

A file is complete or not there (it is written under another name, then renamed) and never changes afterwards. So any
number of processes may read it, memory-mapped, a layer at a time and in any order, while others come and go.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from batchllm.chunkcache.identity import DIGEST_BYTES, ChunkContext, variant_key
from batchllm.core import TokenArray

Bytes = NDArray[np.uint8]

_MAGIC = b"BLLMCHNK"
_VERSION = 2
_ALIGN = 64
_FIXED = struct.Struct("<8sHHIQ16s16s16sIII8s8sff4x")


class _Fixed(NamedTuple):
    """The fields of `_FIXED`, in order."""

    magic: bytes
    version: int
    num_layers: int
    header_bytes: int
    file_bytes: int
    model: bytes
    key: bytes
    context: bytes
    context_tokens: int
    num_tokens: int
    context_chunks: int
    codec: bytes
    dtype: bytes
    outside_mean: float
    inside_mean: float


_LAYER = np.dtype(
    [
        ("heads", "<u4"),
        ("key_dim", "<u2"),
        ("value_dim", "<u2"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
        ("checksum", "<u8"),
    ]
)
_FIRST_READ = 16 * 1024  # most headers are shorter; one read gets them whole


class DamagedChunk(Exception):
    """A chunk file is truncated, changed or not one of ours. The message says which file and what is wrong."""


@dataclass(frozen=True)
class ChunkStatistics:
    """What attention did when the chunk was computed; what the reuse decision needs. See `reuse_decision`.

    Attention weights are averaged over heads and layers.
    """

    outside: NDArray[np.float32]  # [tokens] weight each token gave to the chunks before
    sensitivity: NDArray[
        np.float32
    ]  # [tokens] how differently its K came out in other contexts; 0: not known
    context_chunks: NDArray[np.float32]  # [chunks of the context] weight given to each, summed over tokens
    outside_mean: float  # mean over layers of sum of weights to context chunks / (their tokens * own tokens)
    inside_mean: float  # mean over layers of weights within the chunk / own tokens squared


@dataclass(frozen=True)
class ChunkHeader:
    """All about a stored chunk but its KV."""

    model: bytes
    key: bytes
    tokens: TokenArray
    context: ChunkContext
    statistics: ChunkStatistics
    codec: str
    dtype: str  # of the model that computed it

    @property
    def variant(self) -> bytes:
        return variant_key(self.context, self.codec)


@dataclass(frozen=True, slots=True)
class EncodedLayer:
    """K before RoPE and V of one layer, as the codec wrote them."""

    heads: int
    key_dim: int
    value_dim: int
    data: Bytes


def file_bytes(header: ChunkHeader, layers: Sequence[EncodedLayer]) -> int:
    """Length of the file that `write_chunk_file` will write."""
    end = _header_bytes(len(header.tokens), len(header.context.chunks), len(layers))
    for layer in layers:
        end = _aligned(end) + layer.data.nbytes
    return _aligned(end)


def write_chunk_file(path: str, header: ChunkHeader, layers: Sequence[EncodedLayer], durable: bool) -> None:
    """Writes the whole file at `path`, which nobody reads yet. Raises OSError; what was written then is garbage."""
    table = _layer_table(header, layers)
    body = b"".join(
        (
            _FIXED.pack(*_fixed_fields(header, len(layers), file_bytes(header, layers))),
            np.ascontiguousarray(header.tokens, "<i4").tobytes(),
            np.ascontiguousarray(header.statistics.outside, "<f4").tobytes(),
            np.ascontiguousarray(header.statistics.sensitivity, "<f4").tobytes(),
            b"".join(header.context.chunks),
            np.ascontiguousarray(header.statistics.context_chunks, "<f4").tobytes(),
            table.tobytes(),
        )
    )
    with open(path, "wb") as stream:
        stream.write(body + xxhash.xxh3_64_digest(body))
        for row, layer in zip(table, layers):
            stream.write(bytes(int(row["offset"]) - stream.tell()))
            stream.write(layer.data.data)
        stream.write(bytes(_aligned(stream.tell()) - stream.tell()))
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


class ChunkFile:
    """An open chunk file. Raises DamagedChunk when it is not what it should be, FileNotFoundError when it is gone.

    Opening checks the length, the header and its checksum; the KV of a layer is checked when it is read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            start = os.pread(descriptor, _FIRST_READ, 0)
            fixed = self._check_fixed(start, size)
            if len(start) < fixed.header_bytes:
                start = os.pread(descriptor, fixed.header_bytes, 0)
            self._fixed, self._body = fixed, start[: fixed.header_bytes - 8]
            if xxhash.xxh3_64_digest(self._body) != start[fixed.header_bytes - 8 : fixed.header_bytes]:
                raise DamagedChunk(f"{path}: its header does not have the checksum it was given")
            self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
        self.model, self.key = fixed.model, fixed.key

    @cached_property
    def tokens(self) -> TokenArray:
        return np.frombuffer(self._body, "<i4", self._fixed.num_tokens, _FIXED.size)

    def holds(self, tokens: TokenArray) -> bool:
        """Whether the chunk has exactly these tokens."""
        end = _FIXED.size + 4 * self._fixed.num_tokens
        return self._body[_FIXED.size : end] == np.asarray(tokens, "<i4").tobytes()

    def layer(self, index: int, check: bool = True) -> Bytes:
        """The KV of one layer as the codec wrote it, memory-mapped. `check`: compare its checksum."""
        row = self._table[index]
        begin, count = int(row["offset"]), int(row["bytes"])
        section: Bytes = np.frombuffer(self._map, np.uint8, count, begin)
        if check and xxhash.xxh3_64_intdigest(section.data) != int(row["checksum"]):
            raise DamagedChunk(
                f"{self.path}: the KV of layer {index} does not have the checksum it was given"
            )
        return section

    @property
    def num_layers(self) -> int:
        return self._fixed.num_layers

    @cached_property
    def _table(self) -> NDArray[np.void]:
        count = self._fixed.num_layers
        return np.frombuffer(self._body, _LAYER, count, len(self._body) - count * _LAYER.itemsize)

    def layer_shape(self, index: int) -> tuple[int, int, int]:
        """(KV heads, key dim, value dim)."""
        row = self._table[index]
        return int(row["heads"]), int(row["key_dim"]), int(row["value_dim"])

    def layer_bytes(self) -> NDArray[np.int64]:
        """[layers] encoded size of each layer."""
        return self._table["bytes"].astype(np.int64)

    def _check_fixed(self, start: bytes, size: int) -> _Fixed:
        if len(start) < _FIXED.size or not start.startswith(_MAGIC):
            raise DamagedChunk(f"{self.path}: is not a chunk file")
        fixed = _Fixed._make(_FIXED.unpack_from(start))
        if fixed.version != _VERSION:
            raise DamagedChunk(
                f"{self.path}: has format {fixed.version}, and this batchllm reads format {_VERSION}"
            )
        if size != fixed.file_bytes:
            raise DamagedChunk(f"{self.path}: has {size:,} bytes where {fixed.file_bytes:,} were written")
        if fixed.header_bytes != _header_bytes(fixed.num_tokens, fixed.context_chunks, fixed.num_layers):
            raise DamagedChunk(f"{self.path}: its header is damaged")
        return fixed

    @cached_property
    def header(self) -> ChunkHeader:
        """All the file says of its chunk."""
        fixed, body = self._fixed, self._body
        at = _FIXED.size + self.tokens.nbytes
        outside = np.frombuffer(body, "<f4", fixed.num_tokens, at)
        at += outside.nbytes
        sensitivity = np.frombuffer(body, "<f4", fixed.num_tokens, at)
        at += sensitivity.nbytes
        names = body[at : at + DIGEST_BYTES * fixed.context_chunks]
        chunks = tuple(names[i : i + DIGEST_BYTES] for i in range(0, len(names), DIGEST_BYTES))
        to_chunks = np.frombuffer(body, "<f4", fixed.context_chunks, at + len(names))
        return ChunkHeader(
            fixed.model,
            fixed.key,
            self.tokens,
            ChunkContext(fixed.context, fixed.context_tokens, chunks),
            ChunkStatistics(outside, sensitivity, to_chunks, fixed.outside_mean, fixed.inside_mean),
            fixed.codec.rstrip(b"\0").decode(),
            fixed.dtype.rstrip(b"\0").decode(),
        )


def check_whole_file(path: str) -> ChunkHeader:
    """Reads everything and compares every checksum. Raises DamagedChunk or FileNotFoundError."""
    file = ChunkFile(path)
    for index in range(file.num_layers):
        file.layer(index)
    return file.header


def _layer_table(header: ChunkHeader, layers: Sequence[EncodedLayer]) -> NDArray[np.void]:
    table = np.zeros(len(layers), _LAYER)
    end = _header_bytes(len(header.tokens), len(header.context.chunks), len(layers))
    for row, layer in zip(table, layers):
        row["heads"], row["key_dim"], row["value_dim"] = layer.heads, layer.key_dim, layer.value_dim
        row["offset"], row["bytes"] = _aligned(end), layer.data.nbytes
        row["checksum"] = xxhash.xxh3_64_intdigest(layer.data.data)
        end = _aligned(end) + layer.data.nbytes
    return table


def _fixed_fields(header: ChunkHeader, num_layers: int, length: int) -> _Fixed:
    num_tokens, num_chunks = len(header.tokens), len(header.context.chunks)
    return _Fixed(
        _MAGIC,
        _VERSION,
        num_layers,
        _header_bytes(num_tokens, num_chunks, num_layers),
        length,
        header.model,
        header.key,
        header.context.digest,
        header.context.num_tokens,
        num_tokens,
        num_chunks,
        header.codec.encode(),
        header.dtype.encode(),
        header.statistics.outside_mean,
        header.statistics.inside_mean,
    )


def _header_bytes(tokens: int, chunks: int, layers: int) -> int:
    """Of everything before the first layer, checksum included."""
    return _FIXED.size + tokens * 12 + chunks * (DIGEST_BYTES + 4) + layers * _LAYER.itemsize + 8


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
