"""The state of one sequence that has been admitted."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchllm.core import SamplingParams


@dataclass(slots=True, eq=False)
class Running:
    """Positions: shared nodes hold [0, leaf_start), the leaf holds [leaf_start, ...): first the rest of the
    prompt, up to prompt_length, then every output token but the newest, which is fed in the next step.

    On a GPU the newest `pending` output tokens are known to the device only, until the step is absorbed."""

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
    pending: int = 0  # output tokens that follow those in `output`
    prefilling: bool = False  # known tokens of the leaf still wait to be computed

    @property
    def decoded(self) -> int:
        """Output tokens, pending ones included."""
        return len(self.output) + self.pending

    @property
    def leaf_tokens(self) -> int:
        """Tokens of the leaf that are known, if only to the device: own prompt tokens and output."""
        return self.prompt_length - self.leaf_start + self.decoded

    @property
    def decodes(self) -> bool:
        """Whether it feeds its newest token in the next step."""
        return 0 < self.decoded < self.limit and not self.prefilling

    def take(self, token: int, logprob: float | None) -> None:
        """The oldest pending token is known now."""
        self.output.append(token)
        self.pending -= 1
        if logprob is not None and self.params.logprobs:
            self.logprobs.append(float(logprob))
