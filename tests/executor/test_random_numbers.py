"""Philox against the published vectors, and `uniform` as a pure function of (key, counter)."""

from __future__ import annotations

import numpy as np
import pytest

from batchllm.executor.random_numbers import _philox, uniform

# counter, key, first two words of the result: the philox4x32-10 lines of Random123's kat_vectors
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], (0x6627E8D5, 0xE169C58D)),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, (0x408F276D, 0x41C83B0E)),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        (0xD16CFE09, 0x94FDCCEB),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], expected: tuple[int, int]) -> None:
    words = [np.array([word], dtype=np.uint64) for word in counter]
    k0, k1 = (np.array([word], dtype=np.uint64) for word in key)
    first, second = _philox(words, (k0, k1))
    assert (int(first[0]), int(second[0])) == expected


def some_keys(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    keys = random.integers(0, 2**64, (count, 2), dtype=np.uint64)
    return keys, random.integers(0, 1000, count)


def test_a_number_does_not_depend_on_what_it_is_drawn_with() -> None:
    keys, counters = some_keys(500)
    together = uniform(keys, counters)
    order = np.random.default_rng(1).permutation(500)
    assert (uniform(keys[order], counters[order]) == together[order]).all()
    alone = [uniform(keys[i : i + 1], counters[i : i + 1])[0] for i in range(20)]
    assert alone == together[:20].tolist()


def test_numbers_are_uniform_and_inside_the_open_interval() -> None:
    keys, counters = some_keys(200_000)
    numbers = uniform(keys, counters)
    assert numbers.min() > 0.0
    assert numbers.max() < 1.0
    histogram = np.histogram(numbers, bins=50, range=(0, 1))[0]
    chi_square = ((histogram - 4000.0) ** 2 / 4000.0).sum()
    assert chi_square < 94.0  # 49 degrees of freedom: exceeded once in ten thousand


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
@pytest.mark.parametrize("half", [0, 1])
def test_every_part_of_the_key_counts(half: int, bit: int) -> None:
    keys, counters = some_keys(100)
    changed = keys.copy()
    changed[:, half] ^= np.uint64(1) << np.uint64(bit)
    assert (uniform(keys, counters) != uniform(changed, counters)).all()


def test_consecutive_tokens_of_one_request_are_uncorrelated() -> None:
    key = np.tile(some_keys(1)[0], (20_000, 1))
    numbers = uniform(key, np.arange(20_000))
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert len(np.unique(numbers)) == 20_000
