"""Least squares with coefficients that cannot be negative: times are sums of parts."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def nonnegative_fit(features: FloatArray, seconds: FloatArray) -> FloatArray:
    """Coefficients >= 0 [features] that give `seconds` [n] from `features` [n, features] with the least relative error.

    Tries every set of features, so it is exact; meant for a handful. A feature left out has coefficient 0.
    """
    weight = 1.0 / np.maximum(seconds, 1e-9)
    scale = np.maximum(np.abs(features).max(axis=0), 1e-300)
    rows, target = features / scale * weight[:, None], seconds * weight
    count = features.shape[1]
    best, best_error = np.zeros(count), float(target @ target)
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            found = np.linalg.lstsq(rows[:, chosen], target, rcond=None)[0]
            error = float(np.square(rows[:, chosen] @ found - target).sum())
            if (found >= 0).all() and error < best_error * (1 - 1e-9):
                best, best_error = np.zeros(count), error
                best[list(chosen)] = found
    result: FloatArray = best / scale
    return result
