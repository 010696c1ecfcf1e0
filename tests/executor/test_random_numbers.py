"""Philox against the published vectors, and noise as a pure function of (key, counter, token)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchllm.executor.random_numbers import _philox, draw_words, gumbel_noise

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


VOCABULARY = torch.arange(1000, dtype=torch.int32)


def some_keys(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    keys = random.integers(0, 2**64, (count, 2), dtype=np.uint64)
    return keys, random.integers(0, 1000, count)


def noise(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    made: np.ndarray = gumbel_noise(torch.from_numpy(draw_words(keys, counters)), VOCABULARY).numpy()
    return made


def uniform(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Noise as numbers that are uniform in (0, 1)."""
    return np.exp(-np.exp(-noise(keys, counters).astype(np.float64)))


def test_noise_does_not_depend_on_what_it_is_made_with() -> None:
    keys, counters = some_keys(100)
    together = noise(keys, counters)
    order = np.random.default_rng(1).permutation(100)
    assert (noise(keys[order], counters[order]) == together[order]).all()
    alone = [noise(keys[i : i + 1], counters[i : i + 1])[0] for i in range(20)]
    assert (np.array(alone) == together[:20]).all()
    some = torch.tensor([[7, 999, 0]] * 100, dtype=torch.int32)  # of these tokens alone
    apart = gumbel_noise(torch.from_numpy(draw_words(keys, counters)), some).numpy()
    assert (apart == together[:, [7, 999, 0]]).all()


def test_noise_is_gumbel_and_finite() -> None:
    keys, counters = some_keys(300)
    numbers = uniform(keys, counters)
    assert np.isfinite(noise(keys, counters)).all()
    for parts in (numbers, numbers[:, ::100], numbers[::100]):
        histogram = np.histogram(parts, bins=50, range=(0, 1))[0]
        expected = parts.size / 50
        chi_square = ((histogram - expected) ** 2 / expected).sum()
        assert chi_square < 94.0  # 49 degrees of freedom: exceeded once in ten thousand


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
@pytest.mark.parametrize("half", [0, 1])
def test_every_part_of_the_key_counts(half: int, bit: int) -> None:
    keys, counters = some_keys(100)
    changed = keys.copy()
    changed[:, half] ^= np.uint64(1) << np.uint64(bit)
    assert (noise(keys, counters) != noise(changed, counters)).mean() > 0.99


def test_tokens_steps_and_rows_are_uncorrelated() -> None:
    key = np.tile(some_keys(1)[0], (400, 1))
    steps = uniform(key, np.arange(400))
    rows = uniform(*some_keys(400))
    for numbers in (steps, rows):
        for shifted in (np.roll(numbers, 1, axis=0), np.roll(numbers, 1, axis=1)):
            assert abs(np.corrcoef(numbers.ravel(), shifted.ravel())[0, 1]) < 0.01
        winners = np.bincount(numbers.argmax(axis=1) // 100, minlength=10)
        assert winners.min() > 15 and winners.max() < 70  # 40 expected


def test_noise_is_exact_but_for_rounding() -> None:
    """The kernel that draws in C counts on it: there 5e-5 of a score would matter."""
    keys, counters = some_keys(1000)
    words, tokens = draw_words(keys, counters).view(np.uint32), np.arange(1000, dtype=np.uint32)
    bits = tokens * np.uint32(0x9E3779B1) ^ words[:, :1]
    bits = (bits ^ bits >> 16) * np.uint32(0x7FEB352D) + words[:, 1:]
    bits = (bits ^ bits >> 15) * np.uint32(0x846CA68B)
    bits = (bits ^ bits >> 16) & np.uint32(0x7FFFFFFF)
    numbers = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31 * (1 - 2.0**-24))
    expected = -np.log(-np.log1p(-numbers.astype(np.float64)))
    assert abs(noise(keys, counters) - expected).max() < 5e-6
