"""One request answered with stored chunks: what is placed, what is computed again, and by which rule.

    exact    a chunk is placed where everything before it is what was before it when it was computed: nothing is lost
    naive    every stored chunk is placed and nothing is computed again
    repair   every stored chunk is placed, and the tokens that a rule names are computed again, in all layers, seeing
             everything before them

The question and whatever is not a stored chunk is always computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchllm.chunkcache.decision import FloatArray
from batchllm.chunkcache.key_rotation import KeyRotation
from batchllm.chunkcache.precompute import ChunkedPrompt
from batchllm.chunkcache.request_kv import RequestKv
from batchllm.chunkcache.rules import PlacedChunk, RepairRule
from batchllm.executor.model import ModelRunner


def exact_only(
    prompt: ChunkedPrompt, keys: Sequence[bytes], placed: Sequence[PlacedChunk]
) -> list[PlacedChunk]:
    """Those that were computed after exactly the tokens that stand before them."""
    begins = {begin: index for index, (begin, _) in enumerate(prompt.chunks)}
    return [
        chunk
        for chunk in placed
        if chunk.context.num_tokens == chunk.start
        and chunk.context.digest == prompt.context(begins[chunk.start], keys).digest
    ]


@dataclass(frozen=True)
class Prefilled:
    """A request ready to decode."""

    kv: RequestKv
    logits: Tensor  # of the last prompt token
    computed_tokens: float  # tokens run through all layers; a token run through half of them counts half


def prefill(
    model: ModelRunner,
    rotation: KeyRotation,
    prompt: ChunkedPrompt,
    placed: Sequence[PlacedChunk],
    rule: RepairRule | None,
    max_new_tokens: int,
) -> Prefilled:
    """Places the stored chunks, computes the rest and what `rule` names (None: nothing more)."""
    length = len(prompt.tokens)
    kv = RequestKv(model, length + max_new_tokens)
    device = kv.keys[0].device
    tokens = torch.from_numpy(np.array(prompt.tokens, dtype=np.int64)).to(device)
    covered = np.zeros(length, dtype=bool)
    for chunk in placed:
        covered[chunk.start : chunk.end] = True
    assert not covered[-1], "the last token has to be computed"
    deviation, extra = None, 0.0
    layers = len(model.layers)
    first_placed = 0
    if rule is not None and placed and rule.check_layer is not None:
        everything = torch.arange(length, device=device)
        kv.compute(tokens, everything, last_layer=rule.check_layer)
        deviation = _deviation(kv, placed, rule.check_layer)
        first_placed = rule.check_layer + 1  # what was computed for these layers stays
        extra = length * first_placed / layers
    for chunk in placed:
        turned = rotation.at(torch.arange(chunk.start, chunk.end, device=device))
        for layer in range(first_placed, layers):
            kv.place(layer, chunk.start, turned.apply(layer, chunk.keys[layer]), chunk.values[layer])
    if rule is not None and placed:
        covered[rule.choose(placed, deviation)] = False
    rows = torch.from_numpy(np.flatnonzero(~covered)).to(device)
    logits = kv.compute(tokens[rows], rows)
    return Prefilled(kv, logits, extra + len(rows) * (layers - first_placed) / layers)


def decode_greedy(
    ready: Prefilled, prompt_length: int, max_new_tokens: int, end: frozenset[int]
) -> list[int]:
    """Tokens up to and with the first of `end`, or `max_new_tokens`."""
    found = [int(ready.logits.argmax())]
    device = ready.kv.keys[0].device
    while found[-1] not in end and len(found) < max_new_tokens:
        position = torch.tensor([prompt_length + len(found) - 1], device=device)
        logits = ready.kv.compute(torch.tensor(found[-1:], device=device), position)
        found.append(int(logits.argmax()))
    return found


def _deviation(kv: RequestKv, placed: Sequence[PlacedChunk], layer: int) -> FloatArray:
    parts = [
        (kv.values[layer][chunk.start : chunk.end].float() - chunk.values[layer].float()).square().sum((1, 2))
        for chunk in placed
    ]
    found: FloatArray = torch.cat(parts).cpu().numpy()
    return found
