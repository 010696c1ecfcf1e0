"""Computes the KV of the chunks of one prompt, with the statistics that the reuse decision needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.chunkcache.chunk_file import ChunkHeader, ChunkStatistics, EncodedLayer
from batchllm.chunkcache.codecs import Codec
from batchllm.chunkcache.identity import ChunkContext, chunk_context, chunk_key
from batchllm.chunkcache.key_rotation import KeyRotation
from batchllm.chunkcache.request_kv import RequestKv
from batchllm.core import TokenArray
from batchllm.executor.model import ModelRunner


@dataclass(frozen=True)
class ChunkedPrompt:
    """Tokens, and which stretches of them are chunks: ascending, apart from each other, none empty."""

    tokens: TokenArray
    chunks: tuple[tuple[int, int], ...]  # (first position, one past the last)

    def chunk_tokens(self, index: int) -> TokenArray:
        begin, end = self.chunks[index]
        return self.tokens[begin:end]

    def context(self, index: int, keys: Sequence[bytes]) -> ChunkContext:
        """What stands before a chunk. `keys`: of all chunks of the prompt."""
        return chunk_context(self.tokens[: self.chunks[index][0]], keys[:index])


@dataclass(frozen=True)
class ComputedChunk:
    """A chunk's KV as it goes into a store."""

    tokens: TokenArray
    context: ChunkContext
    statistics: ChunkStatistics
    looked_at: NDArray[np.float32]  # [tokens] attention from other tokens of its prompt, in the last layers
    keys: list[Tensor]  # by layer [tokens, heads, dim], before RoPE
    values: list[Tensor]

    def header(self, model: bytes, codec: Codec, dtype: str) -> ChunkHeader:
        key = chunk_key(model, self.tokens)
        return ChunkHeader(model, key, self.tokens, self.context, self.statistics, codec.name, dtype)

    def encoded(self, codec: Codec) -> list[EncodedLayer]:
        return [encode_layer(codec, key, value) for key, value in zip(self.keys, self.values)]


def encode_layer(codec: Codec, key: Tensor, value: Tensor) -> EncodedLayer:
    """K before RoPE and V [tokens, heads, dim] of one layer, one after the other."""
    data = torch.cat((codec.encode(key, "key"), codec.encode(value, "value")))
    return EncodedLayer(key.shape[1], key.shape[2], value.shape[2], data.cpu().numpy())


def decode_layer(
    codec: Codec, layer: EncodedLayer, num_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(K before RoPE, V) [tokens, heads, dim] as `dtype`."""
    data = torch.from_numpy(layer.data)
    end = codec.num_bytes(num_tokens, layer.heads, layer.key_dim, "key")
    key = codec.decode(data[:end], num_tokens, layer.heads, layer.key_dim, "key", dtype)
    value = codec.decode(data[end:], num_tokens, layer.heads, layer.value_dim, "value", dtype)
    return key, value


def compute_chunks(
    model: ModelRunner, rotation: KeyRotation, prompt: ChunkedPrompt, identity: bytes
) -> list[ComputedChunk]:
    """Runs the prompt up to the end of its last chunk and returns every chunk of it, in order."""
    end = prompt.chunks[-1][1] if prompt.chunks else 0
    if not end:
        return []
    observed = _AttentionSums(prompt, end, len(model.layers))
    kv = RequestKv(model, end)
    device = kv.keys[0].device
    positions = torch.arange(end, device=device)
    tokens = torch.from_numpy(np.array(prompt.tokens[:end], dtype=np.int64)).to(device)
    kv.compute(tokens, positions, observe=observed.add, last_layer=len(model.layers) - 1)
    placed = rotation.at(positions)
    unturned = [placed.undo(layer, key) for layer, key in enumerate(kv.keys)]
    keys = [chunk_key(identity, prompt.chunk_tokens(index)) for index in range(len(prompt.chunks))]
    return [
        ComputedChunk(
            prompt.chunk_tokens(index),
            prompt.context(index, keys),
            observed.statistics(index),
            observed.looked_at(index),
            [key[begin:stop].clone() for key in unturned],
            [value[begin:stop].clone() for value in kv.values],
        )
        for index, (begin, stop) in enumerate(prompt.chunks)
    ]


def sensitivity(computed: Sequence[ComputedChunk]) -> NDArray[np.float32]:
    """[tokens] how much it matters that the K of each token depends on the context: 0 for all if there is only one.

    `computed`: one chunk in several contexts. The squared difference of K before RoPE, over that of K, averaged over
    pairs of contexts and the second half of the layers (what a context changes builds up from layer to layer), times
    the attention that the token gets from others: the first tokens of a chunk come out differently everywhere, and
    what nobody looks at needs no repair.
    """
    first, num_layers = computed[0], len(computed[0].keys)
    total = torch.zeros(len(first.tokens), dtype=torch.float32)
    pairs = [(one, other) for index, one in enumerate(computed) for other in computed[:index]]
    late = range(num_layers // 2, num_layers)
    for one, other in pairs:
        for layer in late:
            key, other_key = one.keys[layer].float(), other.keys[layer].float()
            difference = (key - other_key).square().sum(dim=(1, 2))
            total += (difference / key.square().sum(dim=(1, 2)).mean().clamp_min(1e-30)).cpu()
    looked_at = np.mean([each.looked_at for each in computed], axis=0)
    found: NDArray[np.float32] = (total / max(1, len(pairs) * len(late))).numpy() * looked_at
    return found


def merged(stored: ComputedChunk, seen: Sequence[ComputedChunk]) -> ComputedChunk:
    """The KV of `stored` with what is known from other contexts that the same chunk was computed in.

    A chunk stored as computed alone has no attention to other chunks of its own: it takes the mean of what was seen.
    """
    own = replace(stored.statistics, sensitivity=sensitivity(list(seen) or [stored]))
    in_company = [chunk.statistics for chunk in seen if chunk.context.chunks]
    if stored.context.chunks or not in_company:
        return replace(stored, statistics=own)
    return replace(
        stored,
        statistics=replace(
            own,
            outside=np.mean([each.outside for each in in_company], axis=0),
            outside_mean=float(np.mean([each.outside_mean for each in in_company])),
            inside_mean=float(np.mean([each.inside_mean for each in in_company])),
        ),
    )


class _AttentionSums:
    """Attention from every token to every chunk, averaged over heads and layers, as it is computed."""

    def __init__(self, prompt: ChunkedPrompt, end: int, num_layers: int):
        self._chunks, self._num_layers = prompt.chunks, num_layers
        self._within = torch.zeros(
            end, len(prompt.chunks)
        )  # [tokens, chunks] 1 where the token is in the chunk
        for index, (begin, stop) in enumerate(prompt.chunks):
            self._within[begin:stop, index] = 1
        self._to_chunk = torch.zeros(end, len(prompt.chunks))
        self._from_others = torch.zeros(end)  # of the last quarter of the layers

    def add(self, layer: int, first: int, weights: Tensor) -> None:
        """`weights` [Hq, queries, keys] of the tokens from `first` on."""
        mean = weights.mean(dim=0).cpu()
        queries, keys = mean.shape
        self._to_chunk[first : first + queries] += torch.matmul(mean, self._within[:keys]) / self._num_layers
        if 4 * (self._num_layers - layer) <= max(4, self._num_layers):
            own = mean.diagonal(offset=first)
            self._from_others[:keys] += mean.sum(dim=0)
            self._from_others[first : first + queries] -= own

    def looked_at(self, index: int) -> NDArray[np.float32]:
        """[tokens of the chunk]"""
        begin, stop = self._chunks[index]
        found: NDArray[np.float32] = self._from_others[begin:stop].numpy().copy()
        return found

    def statistics(self, index: int) -> ChunkStatistics:
        begin, stop = self._chunks[index]
        own = self._to_chunk[begin:stop]  # [tokens, chunks]
        lengths = np.array([end - start for start, end in self._chunks[:index]], dtype=np.float64)
        to_each = own[:, :index].sum(dim=0).double().numpy()
        size = stop - begin
        return ChunkStatistics(
            own[:, :index].sum(dim=1).numpy(),
            np.zeros(size, dtype=np.float32),
            to_each.astype(np.float32),
            float((to_each / (lengths * size)).sum()),
            float(own[:, index].sum()) / size**2,
        )
