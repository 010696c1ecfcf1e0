"""From the structure that parameters ask for to a grammar, and whether any text can satisfy it. Through llguidance.

JSON may have one space, or a line break and an indentation, where JSON allows white space: a model that writes no end
of it would never come to its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchllm.core import PromptTable, SamplingParams
from batchllm.errors import ModelError

_JSON_SPACE = r"( |\n {0,16})?"


def load_vocabulary(tokenizer: Any, size: int, eos_ids: Sequence[int]) -> Any:
    """The tokenizer's tokens as llguidance wants them (an LLTokenizer), for logits of `size` tokens.

    Raises ModelError when llguidance is missing or does not know tokenizers of this kind.
    """
    try:
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise ModelError(
            "choice, regex, json_schema and grammar need llguidance; pip install llguidance"
        ) from None
    known = max(size, len(tokenizer))
    ends = [token for token in eos_ids if token < known] or [tokenizer.eos_token_id]
    if ends == [None]:
        raise ModelError("choice, regex, json_schema and grammar need a model with an end-of-sequence token")
    try:
        return from_tokenizer(tokenizer, n_vocab=known, eos_token=ends)
    except Exception as error:
        raise ModelError(
            f"the model's tokenizer cannot be used with choice, regex, json_schema or grammar: {error}"
        ) from None


def grammar_of(params: SamplingParams) -> str:
    """The grammar of what `params.structure` names. Any text in it is one: errors come when it is compiled."""
    from llguidance import LLMatcher

    if params.choice:
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        return str(LLMatcher.grammar_from_lark(f"start: {alternatives}"))
    if params.regex:
        return str(LLMatcher.grammar_from_regex(params.regex))
    if params.grammar:
        return str(LLMatcher.grammar_from_lark(params.grammar))
    schema = params.json_schema if params.json_schema != "true" else "{}"
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _JSON_SPACE}))


def compile_grammar(params: SamplingParams, vocabulary: Any) -> Any:
    """An LLMatcher at the beginning of an answer; ValueError, the end of "json_schema ...", if there is none."""
    from llguidance import LLMatcher

    if params.json_schema == "false":
        raise ValueError("is false, which no text satisfies")
    try:
        grammar = grammar_of(params)
        problem = str(LLMatcher.validate_grammar(grammar, vocabulary))
    except Exception as error:
        problem = str(error)
    if problem:
        raise ValueError(f"cannot be used: {one_line(problem)}")
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    if matcher.is_error():
        raise ValueError(f"cannot be used: {one_line(matcher.get_error())}")
    if not matcher.is_accepting():
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed[vocabulary.eos_tokens] = 0
        if matcher.is_error() or not allowed.any():
            raise ValueError("cannot be used: no text satisfies it")
    return matcher


def refuse_impossible_structures(
    prompts: PromptTable, tokenizer: Any, size: int, eos_ids: Sequence[int]
) -> PromptTable:
    """Adds a fault for every row whose structure cannot be compiled or that no text satisfies.

    Size and ends of text are those that the engine will have: see `load_vocabulary`.
    """
    structured = [index for index, params in enumerate(prompts.params) if params.structure]
    used = set(np.unique(prompts.params_of).tolist()).intersection(structured)
    if not used:
        return prompts
    vocabulary = load_vocabulary(tokenizer, size, eos_ids)
    problems: dict[tuple[str, object], str] = {}
    reasons: dict[int, str] = {}  # by set of parameters
    for index in sorted(used):
        params = prompts.params[index]
        key = (params.structure, getattr(params, params.structure))
        if key not in problems:
            problems[key] = _problem(params, vocabulary)
        if problems[key]:
            reasons[index] = problems[key]
    return with_faults(prompts, reasons)


def with_faults(prompts: PromptTable, reasons: Mapping[int, str]) -> PromptTable:
    """Adds a fault for every row with a set of parameters that is named, by its index, with the reason."""
    if not reasons:
        return prompts
    of_row = enumerate(prompts.params_of.tolist())
    faults = {row: reasons[index] for row, index in of_row if index in reasons}
    return replace(prompts, faults={**faults, **prompts.faults})


def _problem(params: SamplingParams, vocabulary: Any) -> str:
    try:
        compile_grammar(params, vocabulary)
    except ValueError as error:
        return f"generate.{params.structure} {error}"
    return ""


def one_line(text: str) -> str:
    """The first line that says something, and the library's own conclusion if it is further down."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    conclusion = [line for line in lines[1:] if line.startswith("error:")]
    return " ".join([lines[0], *conclusion[:1]])[:300] if lines else "it is not understood"
