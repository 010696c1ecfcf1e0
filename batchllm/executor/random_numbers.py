"""Counter-based random numbers: the number at (key, counter) depends on nothing else.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), vectorised. A request's
128-bit key and the index of the token give one uniform number, so a row's text does not depend on what was
batched beside it, on the order of rows, or on where a resumed run started.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def uniform(keys: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.float64]:
    """keys [n, 2] (128 bits each), counters [n] → [n] numbers in (0, 1), 53 bits each."""
    first, second = keys[:, 0], keys[:, 1]
    words = [counters.astype(np.uint64) & _LOW, first >> _SHIFT, first & _LOW, second >> _SHIFT]
    high, low = _philox(words, (second & _LOW, (first ^ second) & _LOW))
    bits = (high << np.uint64(21)) ^ (low >> np.uint64(11))
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


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
