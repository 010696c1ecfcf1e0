"""Sampling parameters that do not go together."""

from __future__ import annotations

from batchllm.core import SamplingParams


def contradiction(params: SamplingParams) -> tuple[str, str] | None:
    """(parameter, the end of the sentence "it ...") of the first contradiction, each value being in range."""
    kinds = [kind for kind in ("choice", "regex", "json_schema", "grammar") if getattr(params, kind)]
    if params.min_tokens > params.max_tokens:
        return "min_tokens", f"{params.min_tokens:,} but max_tokens {params.max_tokens:,}; lower min_tokens"
    if len(kinds) > 1:
        return kinds[1], f"beside {kinds[0]}; an answer can have one structure, so remove one of them"
    if params.best_of and params.best_of < params.n:
        return "best_of", f"{params.best_of} but n {params.n}; best_of must be at least n"
    if params.best_of > params.n and params.greedy:
        return "best_of", "but temperature 0, at which all answers are the same; set a temperature"
    if kinds and params.ignore_eos:
        return "ignore_eos", f"beside {kinds[0]}, whose answers have an end; remove one of them"
    return None
