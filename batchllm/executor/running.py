"""The state of one sequence that has been admitted."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchllm.core import SamplingParams


@dataclass(slots=True, eq=False)
class Running:
    """Positions: shared nodes hold [0, leaf_start), the leaf holds [leaf_start, ...): first the rest of the
    prompt, up to prompt_length, then every output token but the newest, which is fed in the next step."""

    sequence: int
    leaf: int
    path: tuple[int, ...]  # shared nodes above the leaf, root first
    leaf_start: int
    prompt_length: int
    params: SamplingParams
    limit: int  # most output tokens
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prefilling: bool = False  # known tokens of the leaf still wait to be computed

    @property
    def leaf_tokens(self) -> int:
        """Tokens of the leaf that are known: own prompt tokens and output."""
        return self.prompt_length - self.leaf_start + len(self.output)

    @property
    def most_leaf_tokens(self) -> int:
        """Slots the leaf can ever need. The last output token is never fed."""
        return max(1, self.prompt_length - self.leaf_start + self.limit - 1)
