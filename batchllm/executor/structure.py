"""Which tokens keep each answer within its structure, found while the model computes the next step.

masks = StructureMasks(vocabulary, size)
logits = masks.apply(logits, runs)      waits for the masks of these sequences, which by then are made
masks.advance(runs, tokens)             takes the chosen tokens in, and starts making the next masks
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import SamplingParams
from batchllm.executor.grammars import compile_grammar
from batchllm.executor.running import Running

_COMPILED = 1024  # grammars kept


class StructureMasks:
    """The state of every structured sequence, from its first token to `forget`."""

    def __init__(self, vocabulary: Any, size: int) -> None:
        """vocabulary: of `load_vocabulary`; size: how many logits a row has."""
        from llguidance import LLExecutor

        self._vocabulary, self._size = vocabulary, size
        self._words = (int(vocabulary.vocab_size) + 31) // 32
        self._matchers: dict[int, Any] = {}
        self._masks: dict[
            int, tuple[Future[NDArray[np.bool_]], int]
        ] = {}  # the step's masks, and the row in them
        self._is_valid: dict[int, bool] = {}  # what has been written is a whole answer
        self._ended: set[int] = set()  # nothing may follow what has been written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="structure")
        self._executor = LLExecutor()
        self._compiled = lru_cache(_COMPILED)(self._compile)

    def apply(self, logits: Tensor, runs: Sequence[Running]) -> Tensor:
        """logits [n, V] with -inf where a structured row must not go; a copy unless nothing changes."""
        rows = [row for row, run in enumerate(runs) if run.params.structure]
        if not rows:
            return logits
        new = [runs[row] for row in rows if runs[row].sequence not in self._matchers]
        for run in new:
            self._matchers[run.sequence] = self._start(run)
        self._make([run.sequence for run in new])
        logits = logits.clone()
        for row in rows:
            future, place = self._masks[runs[row].sequence]
            logits[row].masked_fill_(torch.from_numpy(future.result()[place]), float("-inf"))
        return logits

    def advance(self, runs: Sequence[Running], tokens: NDArray[np.int64]) -> None:
        """The tokens [n] were chosen for these sequences from logits that `apply` gave."""
        going = []
        for run, token in zip(runs, tokens.tolist()):
            if run.params.structure:
                matcher = self._matchers[run.sequence]
                goes_on = matcher.consume_token(token) and not matcher.is_stopped()
                # While its mask is made, nobody else may ask the matcher anything.
                self._is_valid[run.sequence] = matcher.is_accepting() and not matcher.is_error()
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

    def forget(self, sequence: int) -> None:
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
            future = self._thread.submit(self._forbidden, matchers)
            self._masks.update({sequence: (future, place) for place, sequence in enumerate(sequences)})

    def _forbidden(self, matchers: list[tuple[Any, int]]) -> NDArray[np.bool_]:
        """[n, V] the tokens that must not come, in another thread."""
        bits = np.zeros((len(matchers), self._words), dtype=np.int32)
        self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, 4 * self._words, len(matchers))
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=self._size, bitorder="little")
        forbidden: NDArray[np.bool_] = allowed == 0
        return forbidden
