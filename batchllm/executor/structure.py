"""Which tokens keep each answer within its structure, found while the model computes the next step.

masks = StructureMasks(vocabulary, size)
masks.apply(logits, runs)               waits for the masks of these sequences, which by then are made
masks.advance(runs, tokens)             takes the chosen tokens in, and starts making the next masks

A mask is a bit for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from batchllm_kernels.cpu.forbid import forbid
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import SamplingParams
from batchllm.executor.grammars import compile_grammar, one_line
from batchllm.executor.native import native_kernels
from batchllm.executor.running import Running

_COMPILED = 1024  # grammars kept
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
# [256, 8] what is added to eight logits, by a byte of bits that say which tokens may come.
_SPREAD = np.where(_BITS, 0.0, -np.inf).astype(np.float32)


class StructureMasks:
    """The state of every structured sequence, from its first token to `forget`."""

    def __init__(self, vocabulary: Any, size: int) -> None:
        """vocabulary: of `load_vocabulary`; size: how many logits a row has."""
        from llguidance import LLExecutor

        self._vocabulary, self._size = vocabulary, size
        self._words = (int(vocabulary.vocab_size) + 31) // 32
        self._matchers: dict[int, Any] = {}
        # The masks of a step, [n, words] bits, and the sequence's row in them.
        self._masks: dict[int, tuple[Future[NDArray[np.int32]], int]] = {}
        self._is_valid: dict[int, bool] = {}  # what has been written is a whole answer
        self._errors: dict[int, str] = {}  # why a matcher gave up
        self._ended: set[int] = set()  # nothing may follow what has been written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="structure")
        self._executor = LLExecutor()
        self._kernels = native_kernels(torch.bfloat16)
        self._compiled = lru_cache(_COMPILED)(self._compile)

    @torch.inference_mode()
    def apply(self, logits: Tensor, runs: Sequence[Running]) -> None:
        """Puts -inf into logits [n, V] where a structured row must not go."""
        rows = [row for row, run in enumerate(runs) if run.params.structure]
        new = [runs[row] for row in rows if runs[row].sequence not in self._matchers]
        for run in new:
            self._matchers[run.sequence] = self._start(run)
        self._make([run.sequence for run in new])
        made = [self._masks[runs[row].sequence] for row in rows]
        if len({id(step) for step, _ in made}) == 1 and [place for _, place in made] == [*range(len(logits))]:
            self._forbid(logits, made[0][0].result()[: len(logits)])
            return
        for row, (step, place) in zip(rows, made):
            self._forbid(logits[row : row + 1], step.result()[place : place + 1])

    def advance(self, runs: Sequence[Running], tokens: NDArray[np.int64]) -> None:
        """The tokens [n] were chosen for these sequences from logits that `apply` gave."""
        going = []
        for run, token in zip(runs, tokens.tolist()):
            if run.params.structure:
                matcher = self._matchers[run.sequence]
                goes_on = matcher.consume_token(token) and not matcher.is_stopped()
                # While its mask is made, nobody else may ask the matcher anything.
                self._is_valid[run.sequence] = matcher.is_accepting() and not matcher.is_error()
                if matcher.is_error():
                    self._errors[run.sequence] = one_line(matcher.get_error())
                if goes_on:
                    going.append(run.sequence)
                else:
                    self._ended.add(run.sequence)
        self._make(going)

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
        self._is_valid.pop(sequence, None)
        self._ended.discard(sequence)

    def _start(self, run: Running) -> Any:
        params = run.params
        matcher = self._compiled(params.structure, getattr(params, params.structure)).deep_copy()
        if run.output:
            matcher.consume_tokens(run.output)
        return matcher

    def _compile(self, kind: str, structure: Any) -> Any:
        return compile_grammar(SamplingParams(**{kind: structure}), self._vocabulary)

    def _make(self, sequences: Sequence[int]) -> None:
        """Starts making the masks of these sequences. Their matchers are not touched before the masks are read."""
        if sequences:
            matchers = [(self._matchers[sequence], place) for place, sequence in enumerate(sequences)]
            step = self._thread.submit(self._allowed, matchers)
            self._masks.update({sequence: (step, place) for place, sequence in enumerate(sequences)})

    def _allowed(self, matchers: list[tuple[Any, int]]) -> NDArray[np.int32]:
        """[n, words] bits of the tokens that may come; in another thread."""
        bits = np.zeros((len(matchers), self._words), dtype=np.int32)
        self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, 4 * self._words, len(matchers))
        return bits

    def _forbid(self, logits: Tensor, allowed: NDArray[np.int32]) -> None:
        """logits [n, V] become -inf where the bits [n, words] say so."""
        if self._kernels is not None:
            forbid(self._kernels, logits, allowed)
        else:  # adding takes a tenth of the time of filling in by a mask
            spread = _SPREAD[allowed.view(np.uint8)].reshape(len(allowed), -1)
            logits += torch.from_numpy(spread[:, : self._size])
