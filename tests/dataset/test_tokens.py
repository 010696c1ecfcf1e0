from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from batchllm.dataset.tokens import TokenStoreWriter, open_tokens


def test_prompts_come_back_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 2**31 - 1, rng.integers(0, 50)).tolist() for _ in range(300)]
    with TokenStoreWriter(tmp_path / "t") as store:
        for start in range(0, 300, 70):
            store.append(prompts[start : start + 70])
        store.append([])
    tokens, offsets = open_tokens(tmp_path / "t")
    assert (tokens.dtype, offsets.dtype, len(offsets)) == (np.int32, np.int64, 301)
    assert [tokens[begin:end].tolist() for begin, end in pairwise(offsets)] == prompts
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize("prompts", [[], [[], []]])
def test_no_tokens(tmp_path: Path, prompts: list[list[int]]) -> None:
    with TokenStoreWriter(tmp_path / "t") as store:
        if prompts:
            store.append(prompts)
    tokens, offsets = open_tokens(tmp_path / "t")
    assert (tokens.dtype, len(tokens)) == (np.int32, 0)
    assert offsets.tolist() == [0] * (len(prompts) + 1)


def test_a_new_store_replaces_the_old_one(tmp_path: Path) -> None:
    for prompts in ([[1, 2, 3]], [[7]]):
        with TokenStoreWriter(tmp_path / "t") as store:
            store.append(prompts)
    tokens, offsets = open_tokens(tmp_path / "t")
    assert (tokens.tolist(), offsets.tolist()) == ([7], [0, 1])
