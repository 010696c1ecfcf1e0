"""Counter-based random numbers: what is drawn at (key, counter, token) depends on nothing else.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) makes two words from a request's
128-bit key and the index of its next token. A hash of these and a token id gives that token its Gumbel noise: the
multiply-xorshift finaliser with Wellons' constants ("Prospecting for Hash Functions", 2018), a handful of integer
operations, as there are as many of them as the vocabulary has tokens. So a row's text does not depend on what was
batched beside it, on the order of rows, or on where a resumed run started. The sampling kernel makes the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

_SPREAD = 0x9E3779B1 - 2**32  # neighbouring token ids far apart
_MIX = (0x7FEB352D, 0x846CA68B - 2**32)
_UNIT = float(np.float32(2.0**-31 * (1 - 2.0**-24)))  # a hash of 31 bits and a half, times this, is below 1


def draw_words(keys: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.int32]:
    """keys [n, 2] (128 bits each), counters [n] → [n, 2] two random words each."""
    first, second = keys[:, 0], keys[:, 1]
    words = [counters.astype(np.uint64) & _LOW, first >> _SHIFT, first & _LOW, second >> _SHIFT]
    high, low = _philox(words, (second & _LOW, (first ^ second) & _LOW))
    return np.stack([high, low], axis=1).astype(np.uint32).view(np.int32)


def gumbel_noise(words: Tensor, tokens: Tensor) -> Tensor:
    """words int32 [n, 2], token ids int32 [V] or [n, V] → float32 [n, V], each in (-2.9, 22.3)."""
    bits = tokens * _SPREAD ^ words[:, :1]
    shifted = torch.empty_like(bits)
    _fold(bits, 16, shifted)
    bits *= _MIX[0]
    bits += words[:, 1:]
    _fold(bits, 15, shifted)
    bits *= _MIX[1]
    _fold(bits, 16, shifted)
    bits &= 0x7FFFFFFF
    numbers = bits.to(torch.float32).add_(0.5).mul_(-_UNIT)  # minus a number in (0, 1)
    return numbers.log1p_().neg_().log_().neg_()


def _fold(bits: Tensor, shift: int, shifted: Tensor) -> None:
    """bits ^= bits >> shift, of unsigned words."""
    torch.bitwise_right_shift(bits, shift, out=shifted)
    shifted &= (1 << (32 - shift)) - 1
    bits ^= shifted


def _philox(
    words: list[NDArray[np.uint64]], key: tuple[NDArray[np.uint64], NDArray[np.uint64]]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Ten rounds over four 32-bit words held in uint64 arrays; returns the first two words."""
    a, b, c, d = words
    k0, k1 = key
    for _ in range(10):
        p0, p1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (p1 >> _SHIFT) ^ b ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ d ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return a, b
