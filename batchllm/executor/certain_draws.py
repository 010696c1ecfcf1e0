"""Tokens that the kernel in C draws: only those of which it is certain that torch would draw them too.

A token is drawn from the whole vocabulary. If the row's limits keep it, it is the best of what they keep as well. That
its score is the best is certain if it leads by 1e-4, several times what rounding can come to in float32; one row in ten
thousand has no such lead. That the limits keep it is certain if sums of weights would say so even if they were further
off than they can be. So which way a row is decided cannot be seen in its token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from batchllm_kernels.cpu.draw import draw, stand
from torch import Tensor

from batchllm.core import SamplingParams
from batchllm.executor.native import native_kernels

_ROOM = 2e-3  # sums of weights err by less, as a share of themselves


def certain_tokens(
    logits: Tensor, rows: Tensor, params: Sequence[SamplingParams], temperature: Tensor, words: Tensor
) -> Tensor:
    """logits float32 [.., V], of these the rows [n], all of which `is_drawn_freely`; temperature [n, 1], words [n, 2]
    → tokens [n], -1 where nothing is certain, as everywhere on a machine without the kernels."""
    kernels = native_kernels(torch.bfloat16)
    if kernels is None:
        return torch.full((len(rows),), -1)
    temperature = temperature.flatten()
    tokens: Tensor = draw(kernels, logits, rows, temperature, words)
    limited = torch.tensor(
        [row for row, chosen in enumerate(params) if chosen.top_p < 1.0], dtype=torch.int64
    )
    if len(limited):
        weights = stand(kernels, logits, rows[limited], temperature[limited], tokens[limited])
        tokens[limited[~_are_kept(weights, [params[row] for row in limited.tolist()])]] = -1
    return tokens


def is_drawn_freely(params: SamplingParams) -> bool:
    """Whether the limits, if any, mostly keep what is drawn without them. Where there are few tokens that they could
    keep, as with top-k, looking at those is as fast."""
    return params.top_k == 0 and (params.top_p < 1.0 or params.min_p == 0.0)


def _are_kept(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[n] whether top-p and min-p surely keep tokens with these weights (see `stand`)."""
    above, own, total = weights.double().unbind(dim=1)
    top_p = torch.tensor([row.top_p for row in params], dtype=torch.float64)
    min_p = torch.tensor([row.min_p for row in params], dtype=torch.float64)
    return (above < top_p * total * (1 - _ROOM)) & (own > min_p * (1 + _ROOM))
