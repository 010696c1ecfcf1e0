"""The vocabulary of BatchLLM: what the stages hand to each other. Frozen data, no logic, no torch.

    row       one row of the input table
    request   one answer that is owed: (row, sample). `n` samples per row make `n` requests
    sequence  one stream of decoded tokens that the executor computes. It answers one request, or, when
              decoding is greedy, every request whose prompt and parameters are identical
    node      one stretch of prompt tokens whose KV is stored together: shared by every sequence below it
              (a shared node), or owned by one sequence (a leaf, which also holds the decoded tokens)

Arrays are numpy, one entry per row / request / sequence / node; "CSR" means `x_ptr[i]:x_ptr[i+1]` slices `x`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
TokenArray = NDArray[np.int32]

FinishReason = Literal["stop", "length", "error", "scored"]
TopLogprobs = tuple[tuple[tuple[int, float], ...], ...]  # [tokens][rank] token id, natural log


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. `temperature == 0` is greedy decoding.

    Values are validated where they enter (job.py, the Python API), not here. Logits are changed in this order:
    penalties, `logit_bias`, tokens ruled out (`allowed_token_ids`, `bad_words`, `min_tokens`, structure); then
    temperature, top-k, top-p, min-p. Log-probabilities are of the logits before any of it.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0  # the log-probabilities of so many most probable tokens beside each token
    prompt_logprobs: int | None = None  # of the prompt's tokens, and so many most probable ones beside each
    best_of: int = 0  # answers computed, of which the `n` with the largest mean log-probability stay; 0: n
    repetition_penalty: float = (
        1.0  # of every token of prompt and output: logits divided by it, or times it below 0
    )
    frequency_penalty: float = 0.0  # subtracted for every time that a token is in the output
    presence_penalty: float = 0.0  # subtracted once from every token in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    bad_words: tuple[str, ...] = ()  # texts whose tokens never come one after another
    allowed_token_ids: tuple[int, ...] = ()  # no others come; (): no limit
    min_tokens: int = 0  # no end before so many
    include_stop: bool = False  # keep the stop string in the text
    skip_special_tokens: bool = True  # leave special tokens out of the text
    choice: tuple[str, ...] = ()  # the answer is one of these texts
    regex: str = ""  # the answer matches it
    json_schema: str = ""  # the answer is JSON that satisfies this schema, itself JSON
    grammar: str = ""  # the answer is derived from this grammar (Lark)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def structure(self) -> str:
        """The parameter that says which texts the answer may be; "" when it may be any."""
        kinds = ("choice", "regex", "json_schema", "grammar")
        return next((kind for kind in kinds if getattr(self, kind)), "")


@dataclass(frozen=True)
class PromptTable:
    """Every prompt of the job as token ids, and how each row is to be sampled. Arrays may be memory-mapped.

    A row that could not be turned into a prompt has an empty token range and an entry in `faults`.
    """

    tokens: TokenArray  # [total] all prompts, one after another
    offsets: IntArray  # [rows + 1] row i is tokens[offsets[i]:offsets[i+1]]
    params: tuple[SamplingParams, ...]  # distinct parameter sets
    params_of: NDArray[np.int32]  # [rows] index into `params`
    faults: Mapping[int, str]  # row → why it has no prompt

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class ScoreTable:
    """Which tokens of which rows are scored: their log-probability given everything before them.

    A scored row's text is its prompt and one token more, `last`, which is scored and never fed. Its parameters
    (PromptTable.params_of) are an entry that no generating row uses, and allow one token.
    """

    first: IntArray  # [rows] place in the row's text of the first scored token, at least 1; -1: the row generates
    last: TokenArray  # [rows]


@dataclass(frozen=True)
class ChunkTable:
    """Where the chunks (passages) of each row stand in its prompt: ascending, apart from each other, none empty."""

    ptr: IntArray  # [rows + 1] CSR into the chunks
    begin: IntArray  # [chunks] first token, counted from the beginning of the row's prompt
    end: IntArray  # [chunks] one past the last token

    def of(self, row: int) -> list[tuple[int, int]]:
        """(begin, end) of each chunk of a row."""
        chunks = slice(int(self.ptr[row]), int(self.ptr[row + 1]))
        return list(zip(self.begin[chunks].tolist(), self.end[chunks].tolist()))


@dataclass(frozen=True)
class RequestTable:
    """The answers owed, in input order, and the identity of each: content + configuration, never a row number."""

    row: IntArray  # [requests]
    sample: NDArray[np.int32]  # [requests] 0 .. n-1 within the row
    key: NDArray[np.uint64]  # [requests, 2] 128-bit, unique

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Plan:
    """What to compute, once, and in which order. Made by the planner, read by the executor.

    Nodes are in pre-order of a depth-first walk: a parent comes before its children and the nodes below a node
    are contiguous. The order of the leaves is the order in which sequences are started.

    A node's tokens are `prompt(node_row)[node_start:node_end]`, where `prompt(row)` is a row of the PromptTable.
    Its first `node_copied` tokens equal those of `node_donor`, an earlier node with the same parent: their KV is
    copied instead of computed. (So a prefix too short to be worth a node of its own is still computed once.)
    A leaf may have no prompt tokens of its own (`start == end`): its first token is sampled from the logits of
    the last token above it.
    """

    node_parent: NDArray[np.int32]  # [nodes] -1: no parent
    node_start: NDArray[
        np.int32
    ]  # [nodes] position of the first own token in the prompt (= end of the parent)
    node_end: NDArray[np.int32]  # [nodes] one past the last own prompt token
    node_row: IntArray  # [nodes] a row whose prompt contains these tokens
    node_donor: NDArray[np.int32]  # [nodes] -1: none
    node_copied: NDArray[np.int32]  # [nodes] leading own tokens copied from the donor
    node_leaves: NDArray[np.int32]  # [nodes] number of sequences at or below
    node_sequence: NDArray[np.int32]  # [nodes] the sequence of a leaf, -1 for a shared node
    sequence_node: NDArray[np.int32]  # [sequences] its leaf
    sequence_params: NDArray[np.int32]  # [sequences] index into PromptTable.params
    sequence_group: NDArray[np.int32]  # [sequences] the same: likely of like output length; -1: none
    request_ptr: IntArray  # [sequences + 1] CSR into `request`
    request: IntArray  # indices into RequestTable answered by each sequence; the first one names it
    request_shared: (
        IntArray  # [requests of the RequestTable] prompt tokens taken from another's work (0 if not planned)
    )
    stats: PlanStats

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_node)

    @property
    def num_nodes(self) -> int:
        return len(self.node_parent)


@dataclass(frozen=True, slots=True)
class PlanStats:
    """What the plan saves. Tokens are prompt tokens of the planned requests."""

    requests: int
    sequences: int
    shared_nodes: int
    depth: int  # shared nodes on the longest path
    prompt_tokens: int  # summed over requests, as if nothing were shared
    distinct_tokens: int  # edges of the token trie: the least that has to be computed
    planned_tokens: int  # what this plan computes when nothing has to be recomputed


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Natural log-probabilities of a prompt's own tokens, each given all before it. `n` tokens, `k` beside each.

    Before the first token is nothing: its entries are NaN, and -1 as the tokens beside it.
    """

    tokens: TokenArray  # [n] the prompt
    logprobs: NDArray[np.float32]  # [n]
    top_tokens: NDArray[np.int32]  # [n, k] the most probable tokens, falling
    top_logprobs: NDArray[np.float32]  # [n, k]


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """One finished stream of tokens, as the executor reports it."""

    sequence: int
    tokens: tuple[int, ...]  # includes the end-of-sequence token when there was one
    text: str
    finish_reason: FinishReason
    error: str | None = None
    logprobs: tuple[float, ...] | None = None  # of each token, natural log, when asked for
    top_logprobs: TopLogprobs | None = None  # of the most probable tokens beside each, when asked for
    prompt_logprobs: PromptLogprobs | None = None  # when asked for


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One answer, as it is written: the columns that a run adds to the kept ones."""

    request: int  # index into the RequestTable
    output: str | None
    output_tokens: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None
    prompt_tokens: int
    shared_tokens: int
    logprobs: tuple[float, ...] | None = None
    logprob: float | None = None  # of all scored tokens together, where the request is to score
    is_greedy: bool | None = None  # whether greedy decoding gives just these
    top_logprobs: TopLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
