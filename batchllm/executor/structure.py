"""Which tokens keep each answer within its structure, found while the model computes the next step.

masks = StructureMasks(vocabulary, size)
tokens = masks.choose(logits, runs, draw)     draws tokens that may come, and starts making the next masks

A mask is a bit for each token. The more tokens it allows, the longer it takes to make and the less it is worth. So
where a sequence's last one allowed most of them, the next is left out: a token is drawn first and checked afterwards.
One that must not come is ruled out and another drawn, which is what a mask would have led to, since the drawn token is
the one of the largest score (`sampler.py`). That does not hold under top-k, top-p and min-p: these rows have masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from batchllm_kernels.cpu.forbid import forbid
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import SamplingParams
from batchllm.executor.grammars import compile_grammar, one_line
from batchllm.executor.native import native_kernels
from batchllm.executor.running import Running
from batchllm.executor.sampler import is_limited

_COMPILED = 1024  # grammars kept
_MOST = 0.5  # of the vocabulary: a mask that allows as much is followed by no other
_TRIES = 4  # tokens drawn without a mask before it is made after all
_FEW = 8  # rows refused at a time that get masks at once: to draw again would take longer
_COUNTED = 8  # how much a mask allows is seen from one in so many of its words
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
# [256, 8] what is added to eight logits, by a byte of bits that say which tokens may come.
_SPREAD = np.where(_BITS, 0.0, -np.inf).astype(np.float32)

Draw = Callable[[Sequence[int]], NDArray[np.int64]]  # some rows of logits → a token of each


class StructureMasks:
    """The state of every structured sequence, from its first token to `forget`."""

    def __init__(self, vocabulary: Any, size: int) -> None:
        """vocabulary: of `load_vocabulary`; size: how many logits a row has."""
        from llguidance import LLExecutor

        self._vocabulary, self._size = vocabulary, size
        self._words = (int(vocabulary.vocab_size) + 31) // 32
        self._matchers: dict[int, Any] = {}
        # The masks of a step, and the sequence's row in them; none for a sequence that goes without.
        self._masks: dict[int, tuple[Future[_Masks], int]] = {}
        self._goes_without: set[int] = set()
        self._is_valid: dict[int, bool] = {}  # what has been written is a whole answer
        self._errors: dict[int, str] = {}  # why a matcher gave up
        self._ended: set[int] = set()  # nothing may follow what has been written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="structure")
        self._executor = LLExecutor()
        self._kernels = native_kernels(torch.bfloat16)
        self._compiled = lru_cache(_COMPILED)(self._compile)

    @torch.inference_mode()
    def choose(self, logits: Tensor, runs: Sequence[Running], draw: Draw) -> NDArray[np.int64]:
        """Tokens [n] of these sequences, as `draw` finds them in logits [n, V] when asked for rows of it.

        Puts -inf into the logits where a structured row must not go. A token has -inf only if all of its row have.
        """
        rows = [row for row, run in enumerate(runs) if run.params.structure]
        self._start([runs[row] for row in rows if runs[row].sequence not in self._matchers])
        self._forbid_masked(logits, runs, rows)
        tokens = draw(range(len(runs)))
        refused, tries = self._take_in(runs, rows, tokens), 1
        while refused:
            if tries < _TRIES and len(refused) > _FEW:
                logits[refused, torch.from_numpy(tokens[refused])] = -torch.inf
            else:
                self._make([runs[row].sequence for row in refused])
                self._forbid_masked(logits, runs, refused)
            tokens[refused] = draw(refused)
            refused, tries = self._take_in(runs, refused, tokens), tries + 1
        going = [runs[row].sequence for row in rows if runs[row].sequence not in self._ended]
        for sequence in self._goes_without.intersection(going):
            self._masks.pop(sequence, None)
        self._make([sequence for sequence in going if sequence not in self._goes_without])
        return tokens

    def is_complete(self, run: Running) -> bool:
        """Whether nothing may follow what has been written."""
        return run.sequence in self._ended

    def is_valid(self, run: Running) -> bool:
        """Whether what has been written is a whole answer."""
        return self._is_valid[run.sequence]

    def error(self, run: Running) -> str | None:
        """Why no more masks can be made for a sequence, as for a structure with too many states."""
        return self._errors.get(run.sequence)

    def forget(self, sequence: int) -> None:
        self._errors.pop(sequence, None)
        self._matchers.pop(sequence, None)
        self._masks.pop(sequence, None)
        self._goes_without.discard(sequence)
        self._is_valid.pop(sequence, None)
        self._ended.discard(sequence)

    def _start(self, runs: Sequence[Running]) -> None:
        for run in runs:
            params = run.params
            matcher = self._compiled(params.structure, getattr(params, params.structure)).deep_copy()
            if run.output:
                matcher.consume_tokens(run.output)
            self._matchers[run.sequence] = matcher
        self._make([run.sequence for run in runs])

    def _take_in(self, runs: Sequence[Running], rows: Sequence[int], tokens: NDArray[np.int64]) -> list[int]:
        """The tokens [n] of these rows become part of the answers. Returns the rows of which they must not."""
        refused = []
        for row in rows:
            sequence, token = runs[row].sequence, int(tokens[row])
            matcher = self._matchers[sequence]
            if sequence in self._masks:
                taken = matcher.consume_token(token)
            else:
                taken = matcher.try_consume_tokens([token]) == 1
                if not (taken or matcher.is_error()):
                    refused.append(row)
                    continue
            # While its mask is made, nobody else may ask the matcher anything.
            self._is_valid[sequence] = matcher.is_accepting() and not matcher.is_error()
            if matcher.is_error():
                self._errors[sequence] = one_line(matcher.get_error())
            if not taken or matcher.is_stopped():
                self._ended.add(sequence)
        return refused

    def _compile(self, kind: str, structure: Any) -> Any:
        return compile_grammar(SamplingParams(**{kind: structure}), self._vocabulary)

    def _make(self, sequences: Sequence[int]) -> None:
        """Starts making the masks of these sequences. Their matchers are not touched before the masks are read."""
        if sequences:
            matchers = [(self._matchers[sequence], place) for place, sequence in enumerate(sequences)]
            step = self._thread.submit(self._allowed, matchers)
            self._masks.update({sequence: (step, place) for place, sequence in enumerate(sequences)})

    def _allowed(self, matchers: list[tuple[Any, int]]) -> _Masks:
        """In another thread."""
        bits = np.zeros((len(matchers), self._words), dtype=np.int32)
        self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, 4 * self._words, len(matchers))
        counted = np.ascontiguousarray(bits[:, ::_COUNTED]).view(np.uint8)
        return _Masks(bits, np.unpackbits(counted, axis=1).mean(axis=1) >= _MOST)

    def _forbid_masked(self, logits: Tensor, runs: Sequence[Running], rows: Sequence[int]) -> None:
        """Applies the masks of these rows, where there are any, once they are made."""
        masked = [row for row in rows if runs[row].sequence in self._masks]
        allowed = np.empty((len(masked), self._words), dtype=np.int32)
        for number, row in enumerate(masked):
            run = runs[row]
            step, place = self._masks[run.sequence]
            masks = step.result()
            allowed[number] = masks.bits[place]
            if masks.allows_most[place] and (run.params.greedy or not is_limited(run.params)):
                self._goes_without.add(run.sequence)
            else:
                self._goes_without.discard(run.sequence)
        if masked:
            self._forbid(logits, masked, allowed)

    def _forbid(self, logits: Tensor, rows: Sequence[int], allowed: NDArray[np.int32]) -> None:
        """These rows [m] of logits [n, V] become -inf where the bits [m, words] say so."""
        if self._kernels is not None:
            forbid(self._kernels, logits, np.array(rows), allowed)
        else:  # adding takes a tenth of the time of filling in by a mask
            spread = _SPREAD[allowed.view(np.uint8)].reshape(len(allowed), -1)
            logits[list(rows)] += torch.from_numpy(spread[:, : self._size])


class _Masks(NamedTuple):
    """Of the n sequences whose masks were made together."""

    bits: NDArray[np.int32]  # [n, words] tokens that may come
    allows_most: NDArray[np.bool_]  # [n]
