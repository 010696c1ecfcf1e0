"""Load-time self-check: does this very model give the same logits on flat ragged steps as one sequence at a time?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchllm.executor.forward_context import ATTENTION_NAME
from batchllm.executor.gate import refused
from batchllm.executor.kv_memory import KvExtent
from batchllm.executor.model import ModelRunner
from batchllm.executor.step_builder import Ancestor, StepBuilder

_SHARED, _TAILS = 12, (21, 9)  # two sequences over one shared node, cut into chunks
_ALONE = 5  # and one by itself
_ROUNDING = 4 * 64  # slots of a last page for each of four extents
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
_TOLERANCE_HALF = 0.05  # bf16 and fp16 round differently in every batch; wrong models are off by far more


def check_parity(runner: ModelRunner, *, packed: bool = False) -> None:
    """Swaps in fused layers where the logits stay those of transformers' own attention, else keeps the plain ones.

    `packed`: with weights packed, which is then what is checked. Raises ModelError when neither gives these logits.
    Takes a few short forward passes.
    """
    runner.unfuse()
    sequences = _random_sequences(int(runner.text_config.vocab_size))
    reference = _run_alone(runner, sequences)
    tolerance = _TOLERANCE.get(runner.dtype, _TOLERANCE_HALF)
    # Most models run with fused layers, so these come first: what will not run need not be checked.
    if runner.fuse(packed):
        if _error(runner, sequences, reference) <= tolerance:
            return
        runner.unfuse()
    if packed:
        runner.pack()
    error = _error(runner, sequences, reference)
    if not error <= tolerance:
        raise refused(
            runner.model_type,
            f"its logits differ from transformers' own by {error:.1%} of their range when sequences are batched",
        )


def _error(runner: ModelRunner, sequences: list[np.ndarray], reference: list[Tensor]) -> float:
    ours = _run_flat(runner, sequences)
    errors = torch.cat([_row_errors(flat, alone) for flat, alone in zip(ours, reference)])
    return float(errors.max() if runner.dtype in _TOLERANCE else errors.median())


def _random_sequences(vocabulary: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    shared = random.integers(0, vocabulary, _SHARED)
    tails = [np.concatenate([shared, random.integers(0, vocabulary, tail)]) for tail in _TAILS]
    return [*tails, random.integers(0, vocabulary, _ALONE)]


def _run_alone(runner: ModelRunner, sequences: list[np.ndarray]) -> list[Tensor]:
    """Logits of every position, [length, V], by transformers' eager attention."""
    runner.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return [
                runner.model(
                    input_ids=torch.from_numpy(tokens).unsqueeze(0).to(runner.device), use_cache=False
                )
                .logits[0]
                .float()
                for tokens in sequences
            ]
    finally:
        runner.model.set_attn_implementation(ATTENTION_NAME)


def _run_flat(runner: ModelRunner, sequences: list[np.ndarray]) -> list[Tensor]:
    """The same logits from three steps: a split shared node, a split tail, and a token decoded alone."""
    first, second, alone = sequences
    room = sum(map(len, sequences)) + _ROUNDING
    pool = runner.backend.make_pool(runner.layers, room, runner.dtype)
    node, leaf_a, leaf_b, leaf_c = (
        pool.allocate(size) for size in (_SHARED, len(first) - _SHARED, len(second) - _SHARED, len(alone))
    )
    assert node is not None and leaf_a is not None and leaf_b is not None and leaf_c is not None
    above: list[Ancestor] = [(0, node, 0, _SHARED)]
    cut, middle = _SHARED // 2, _SHARED + _TAILS[0] // 2
    steps: list[list[tuple[np.ndarray, int, int, int, KvExtent, list[Ancestor]]]] = [
        [(first, 0, cut, 0, node, []), (alone, 0, 3, 0, leaf_c, [])],
        [(first, cut, _SHARED, 0, node, []), (first, _SHARED, middle, _SHARED, leaf_a, above)],
        [
            (first, middle, len(first), _SHARED, leaf_a, above),
            (alone, 3, 4, 0, leaf_c, []),
            (second, _SHARED, len(second), _SHARED, leaf_b, above),
        ],
        [(alone, 4, 5, 0, leaf_c, [])],
    ]
    parts: dict[int, list[Tensor]] = {id(tokens): [] for tokens in sequences}
    for step in steps:
        builder = StepBuilder()
        for tokens, begin, end, node_start, extent, ancestors in step:
            builder.add_chunk(tokens[begin:end], begin, node_start, extent, ancestors, end - begin)
        builder.read_all_logits()
        batch = builder.build()
        logits = runner.forward(batch, runner.backend.attention(pool, batch))
        for (tokens, *_), chunk in zip(step, batch.chunks):
            parts[id(tokens)].append(logits[chunk.first : chunk.first + chunk.count])
    second_parts = [*parts[id(first)][:2], *parts[id(second)]]  # its first tokens are the shared node's
    return [torch.cat(parts[id(first)]), torch.cat(second_parts), torch.cat(parts[id(alone)])]


def _row_errors(ours: Tensor, reference: Tensor) -> Tensor:
    scale = reference.abs().max().clamp_min(1e-6)
    return (ours - reference).abs().amax(dim=-1) / scale
