"""Prompts of random tokens, shuffled, and how many tokens each is answered with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workload:
    name: str
    prompts: list[list[int]]
    max_tokens: int


def workloads(vocabulary: int, tiny: bool = False) -> dict[str, Workload]:
    """By name; `tiny` ones have the same form and a handful of tokens."""
    random = np.random.default_rng(0)

    def text(length: int) -> list[int]:
        return random.integers(0, vocabulary, length).tolist()

    def groups(name: str, rows: int, degree: int, prefix: int, own: int, output: int) -> Workload:
        """Every `degree` rows share a prefix of their own."""
        prompts = [
            shared + text(own)
            for shared in (text(prefix) for _ in range(rows // degree))
            for _ in range(degree)
        ]
        return Workload(name, [prompts[index] for index in random.permutation(rows)], output)

    def levels(
        name: str, sizes: tuple[int, int, int], lengths: tuple[int, int, int], output: int
    ) -> Workload:
        """A root, nodes below it, rows below these."""
        root, prompts = text(lengths[0]), []
        for _ in range(sizes[0]):
            topic = root + text(lengths[1])
            for _ in range(sizes[1]):
                document = topic + text(lengths[2])
                prompts += [document + text(lengths[2] // 4) for _ in range(sizes[2])]
        return Workload(name, [prompts[index] for index in random.permutation(len(prompts))], output)

    if tiny:
        made = [
            groups("groups", 8, 4, 40, 6, 4),
            groups("groups, all", 8, 4, 40, 6, 4),
            groups("decode-heavy", 3, 1, 4, 4, 9),
            levels("three levels", (2, 2, 2), (20, 18, 17), 3),
            groups("nothing shared", 4, 1, 5, 12, 3),
        ]
    else:
        made = [
            groups("groups", 800, 16, 2000, 200, 100),
            groups("groups, all", 6400, 16, 2000, 200, 100),  # BatchLLM's microbenchmark
            groups("decode-heavy", 512, 1, 64, 64, 1024),
            levels("three levels", (8, 8, 16), (1000, 500, 250), 100),
            groups("nothing shared", 512, 1, 500, 500, 100),
        ]
    return {workload.name: workload for workload in made}
