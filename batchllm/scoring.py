"""How probable given texts are: pairs of context and continuation, and whole documents in windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.core import PromptTable, SamplingParams, ScoreTable
from batchllm.dataset.encode import tokenize
from batchllm.dataset.prompts import Prompt

_SCORED = SamplingParams(max_tokens=1)  # their own entry in the table, equal to no other by place


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A text as token ids, of which those from `first` (at least 1) on are to be scored."""

    tokens: Sequence[int]
    first: int


Item = (
    TokenSpan | tuple[Sequence[int], SamplingParams] | str
)  # to be scored; to be continued; why neither can be


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities (natural) of the scored tokens of a text, each given everything before it."""

    token_ids: tuple[int, ...]
    token_logprobs: NDArray[np.float32]
    token_greedy: NDArray[np.bool_]  # no token was more probable
    error: str | None = None  # why there is no score

    @property
    def logprob(self) -> float:
        """Of the scored tokens together; NaN where there is an error."""
        return math.nan if self.error else float(self.token_logprobs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give just these tokens."""
        return self.error is None and bool(self.token_greedy.all())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token."""
        return math.exp(-self.logprob / max(1, len(self.token_ids)))

    @classmethod
    def failed(cls, reason: str) -> Score:
        return cls((), np.zeros(0, np.float32), np.zeros(0, bool), reason)

    @classmethod
    def joined(cls, parts: Sequence[Score]) -> Score:
        """The windows of one document, one after another."""
        error = next((part.error for part in parts if part.error), None)
        if error is not None:
            return cls.failed(error)
        return cls(
            tuple(token for part in parts for token in part.token_ids),
            np.concatenate([np.zeros(0, np.float32), *(part.token_logprobs for part in parts)]),
            np.concatenate([np.zeros(0, bool), *(part.token_greedy for part in parts)]),
        )


class MergedContinuation(ValueError):
    """A continuation cannot be told apart from its context in tokens. The message begins with "the continuation"."""


def split_pair(context: Sequence[int], whole: Sequence[int]) -> TokenSpan:
    """The span of a continuation, from the tokens of the context and of the text of both. Raises MergedContinuation."""
    if len(whole) <= len(context):
        raise MergedContinuation("the continuation adds no token to the context; give it text of its own")
    if list(whole[: len(context)]) != list(context):
        raise MergedContinuation(
            "the continuation merges with the context's last token; end the context before the space, "
            "or begin the continuation with one"
        )
    return TokenSpan(whole, len(context))


def after_prefix(tokens: Sequence[int], prefix: int) -> TokenSpan:
    """The span of a text that nothing precedes: it follows the token `prefix`, unless it begins with it."""
    if len(tokens) > 1 and tokens[0] == prefix:
        return TokenSpan(tokens, 1)
    return TokenSpan([prefix, *tokens], 1)


def move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the continuation's first word, as lm-evaluation-harness has it."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def pair_spans(
    tokenizer: Any, contexts: Sequence[Any], continuations: Sequence[Any]
) -> list[list[TokenSpan | str]]:
    """The span of each continuation (texts, or lists of token ids) of each context, or what is wrong with it."""
    pairs = [
        [(context, option) if _is_ids(context) else move_spaces(context, option) for option in options]
        for context, options in zip(contexts, continuations)
    ]
    named = [pair for row in pairs for pair in row if not _is_ids(pair[0])]
    texts = [text for context, option in named if context for text in (context, context + option)]
    encoded = encode_all(tokenizer, texts, None)
    bare = encode_all(tokenizer, [option for context, option in named if not context], False)
    prefix = prefix_token(tokenizer) if bare else -1
    first = {option: after_prefix(tokens, prefix) for option, tokens in bare.items()}
    return [[_span(context, option, encoded, first) for context, option in row] for row in pairs]


def _span(
    context: Any, option: Any, encoded: Mapping[str, Sequence[int]], first: Mapping[str, TokenSpan]
) -> TokenSpan | str:
    """`first`: the spans of continuations of an empty context."""
    if not len(option):
        return "the continuation is empty; give it text of its own"
    if _is_ids(context):
        return TokenSpan([*context, *option], len(context))
    if not context:
        return first[option]
    try:
        return split_pair(encoded[context], encoded[context + option])
    except MergedContinuation as error:
        return str(error)


def _is_ids(value: Any) -> bool:
    return not isinstance(value, str)


def prefix_token(tokenizer: Any) -> int:
    """What stands before the first token of a document: BOS, or EOS where there is none. Raises ValueError."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither a BOS nor an EOS token")


def windows(tokens: Sequence[int], prefix: int, max_length: int) -> list[TokenSpan]:
    """A document in spans that a model of `max_length` tokens can read; every token is scored once.

    As lm-evaluation-harness does with one token of context: the first window begins with the token `prefix`, each
    later one with the token before its first scored one, and the last is filled up with context to its left.
    """
    spans = []
    for begin in range(0, len(tokens), max_length):
        end = min(begin + max_length, len(tokens))
        start = end - max_length - 1  # the window reads max_length tokens, and its last token is not read
        if begin == 0:
            spans.append(TokenSpan([prefix, *tokens[:end]], 1))
        else:
            spans.append(TokenSpan(tokens[start:end], begin - start))
    return spans


def mixed_table(
    items: Sequence[Item], max_length: int | None, vocabulary: int
) -> tuple[PromptTable, ScoreTable]:
    """One table of texts to score, prompts to continue, and rows with the reason why they have neither."""
    params: dict[SamplingParams, int] = {}
    rows: list[Sequence[int]] = []
    params_of, first, last = [], [], []
    faults: dict[int, str] = {}
    for row, item in enumerate(items):
        tokens: Sequence[int] = ()
        start, end, index = -1, 0, 0
        if isinstance(item, str):
            faults[row] = item
        elif isinstance(item, TokenSpan):
            fault = span_fault(item, max_length, vocabulary)
            if fault is not None:
                faults[row] = fault
            else:
                tokens, start, end = item.tokens[:-1], item.first, item.tokens[-1]
        else:
            tokens, chosen = item
            index = 1 + params.setdefault(chosen, len(params))
        rows.append(tokens)
        params_of.append(index)
        first.append(start)
        last.append(end)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    flat = np.concatenate([np.zeros(0, np.int32), *(np.asarray(tokens, np.int32) for tokens in rows)])
    table = PromptTable(
        flat,
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        (_SCORED, *params),
        np.array(params_of, dtype=np.int32),
        faults,
    )
    return table, ScoreTable(np.array(first, dtype=np.int64), np.array(last, dtype=np.int32))


def joined_tables(parts: Sequence[tuple[PromptTable, ScoreTable]]) -> tuple[PromptTable, ScoreTable]:
    """Tables of texts to score, which `mixed_table` made, one after another as one."""
    empty = mixed_table([], None, 0)
    tables, scored = zip(empty, *parts)
    first_row = np.cumsum([0, *(table.num_rows for table in tables)]).tolist()
    lengths = np.concatenate([np.diff(table.offsets) for table in tables])
    table = PromptTable(
        np.concatenate([table.tokens for table in tables]),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        (_SCORED,),
        np.zeros(len(lengths), dtype=np.int32),
        {start + row: why for start, table in zip(first_row, tables) for row, why in table.faults.items()},
    )
    return table, ScoreTable(
        np.concatenate([one.first for one in scored]), np.concatenate([one.last for one in scored])
    )


def span_fault(span: TokenSpan, max_length: int | None, vocabulary: int) -> str | None:
    """Why the model cannot score a span."""
    if not 1 <= span.first < len(span.tokens):
        return "there is nothing to score, or nothing before it"
    if max_length and len(span.tokens) - 1 > max_length:
        return f"the text has {len(span.tokens):,} tokens; the model can score at most {max_length + 1:,}"
    largest, smallest = max(span.tokens), min(span.tokens)
    if smallest < 0 or largest >= vocabulary:
        unknown = smallest if smallest < 0 else largest
        return f"the text has the token id {unknown:,}; the model knows {vocabulary:,} tokens"
    return None


def encode_all(
    tokenizer: Any, texts: Iterable[str], add_special_tokens: bool | None
) -> dict[str, Sequence[int]]:
    """Token ids of each distinct text; none for what cannot be tokenised. Special tokens are added by default."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = tokenize(tokenizer, [Prompt(text, add_special_tokens is not False) for text in distinct])
    return dict(zip(distinct, encoded.ids))
