"""Counter-based random numbers on the device: what is drawn at (key, index, token) depends on nothing else.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) makes two words of a key and an
index, and a hash of these and a token's id its Gumbel noise, in the very way of BatchLLM's CPU path.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchllm_kernels import interpreter  # noqa: F401 - prepares the interpreter where it runs the kernels

_SPREAD = tl.constexpr(0x9E3779B1)
_MIX_0, _MIX_1 = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B)
_UNIT = tl.constexpr(4.656612595521636e-10)  # 2^-31 x (1 - 2^-24), a float32


@triton.jit
def draw_words(first, second, index):
    """int64 key halves and token index → two uint32 words."""
    first, second = first.to(tl.uint64, bitcast=True), second.to(tl.uint64, bitcast=True)
    mixed = first ^ second
    high, low, _, _ = tl.philox(
        (second & 0xFFFFFFFF) | (mixed << 32),
        index.to(tl.uint32),
        (first >> 32).to(tl.uint32),
        first.to(tl.uint32),
        (second >> 32).to(tl.uint32),
    )
    return high, low


@triton.jit
def gumbel_noise(first, second, tokens):
    """The row's two words and int32 token ids → float32 noise, each in (-2.9, 22.3)."""
    bits = tokens.to(tl.uint32) * _SPREAD ^ first
    bits ^= bits >> 16
    bits = bits * _MIX_0 + second
    bits ^= bits >> 15
    bits *= _MIX_1
    bits ^= bits >> 16
    number = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * _UNIT
    # -log(1 - number): as a series where 1 - number would lose its digits.
    s = number / (2.0 - number)
    series = 2.0 * s * (1.0 + s * s * (0.33333333 + s * s * (0.2 + s * s * 0.14285715)))
    return -tl.log(tl.where(number < 0.25, series, -tl.log(1.0 - number)))
