"""Turns keys to another position: K before RoPE + positions → K as the model's attention sees it, and back.

Architectures differ in how they turn (halves or neighbours, all of a head or a part, other frequencies in other
layers, some layers not at all) and in how frequencies are scaled (linear, YaRN, Llama 3 ...). cos and sin come from the
model's own rotary modules, so every scaling is right; how they are applied is found out by a probe: a few tokens, each
alone at several positions. Alone, a token's attention is its own value wherever it stands, so the keys of one token at
two positions differ in every layer by the rotation and by nothing else. The layout that explains all of them is taken;
if none does, the model is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchllm.errors import ModelError
from batchllm.executor.forward_context import attention_of
from batchllm.executor.model import ModelRunner

_PROBE_POSITIONS = (0, 1, 3, 10, 45)
_PROBE_TOKENS = 5
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class _Table(NamedTuple):
    """A rotary module, for one kind of layers if it tells them apart."""

    module: nn.Module
    layer_type: str | None

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As the module gives them: [T, as many as it likes] each, computed as for states of `dtype`."""
        like = torch.empty(1, 1, 1, dtype=dtype, device=positions.device)
        arguments = () if self.layer_type is None else (self.layer_type,)
        found: Any = self.module(like, positions.unsqueeze(0), *arguments)
        if isinstance(found, Tensor):  # complex numbers
            found = (found.real, found.imag)
        cos, sin = (part[0].float() for part in found)
        return cos, sin


@dataclass(frozen=True)
class _Layout:
    """Which channels of a head turn together, and by which column of the table."""

    table: int
    columns: str  # of the table, one per frequency: "half", "all" or "even"
    first: int  # first turned channel
    frequencies: int
    neighbours: bool  # pairs (0, 1), (2, 3) ...; else (0, n), (1, n + 1) ...

    def of_frequencies(self, table: Tensor) -> Tensor:
        """[T, width] → [T, frequencies]."""
        return {"half": table[:, : table.shape[1] // 2], "all": table, "even": table[:, ::2]}[self.columns]

    def pairs(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The two channels of every pair: [T, heads, frequencies] each, views."""
        turned = key[..., self.first : self.first + 2 * self.frequencies]
        if self.neighbours:
            return turned[..., 0::2], turned[..., 1::2]
        return turned[..., : self.frequencies], turned[..., self.frequencies :]


class PlacedKeys:
    """Rotations for one list of positions, shared by all layers."""

    def __init__(self, rotation: KeyRotation, positions: Tensor):
        self._layouts = rotation.layouts
        self._tables = [table.cos_sin(positions, rotation.dtype) for table in rotation.tables]

    def select(self, index: Tensor) -> PlacedKeys:
        """Those of some of the positions. Runs no code of the model: for use in other threads."""
        chosen = object.__new__(PlacedKeys)
        chosen._layouts = self._layouts
        chosen._tables = [(cos[index], sin[index]) for cos, sin in self._tables]
        return chosen

    def apply(self, layer: int, key: Tensor) -> Tensor:
        """K before RoPE [T, heads, dim] → K at the positions, in the same dtype."""
        return self._turned(layer, key, back=False)

    def undo(self, layer: int, key: Tensor) -> Tensor:
        """K at the positions → K before RoPE. Exact up to rounding, whatever the model scales K by."""
        return self._turned(layer, key, back=True)

    def _turned(self, layer: int, key: Tensor, back: bool) -> Tensor:
        layout = self._layouts[layer]
        if layout is None:
            return key
        return _turn(layout, key, *self._tables[layout.table], back=back)


class KeyRotation:
    """How every layer of a model turns its keys; made by `find_rotation`."""

    def __init__(self, tables: Sequence[_Table], layouts: Sequence[_Layout | None], dtype: torch.dtype):
        self.tables, self.layouts, self.dtype = tuple(tables), tuple(layouts), dtype

    @torch.inference_mode()
    def at(self, positions: Tensor) -> PlacedKeys:
        """`positions` [T], whole numbers."""
        return PlacedKeys(self, positions)


@torch.inference_mode()
def find_rotation(model: ModelRunner) -> KeyRotation:
    """Raises ModelError when positions enter this model in a way that cannot be moved."""
    keys, values = _probe(model)
    tables = list(_tables_of(model.model))
    tolerance = _TOLERANCE.get(model.dtype, 1e-3)
    if any(_spread(value) > tolerance for value in values):
        raise _refusal(model, "its values depend on their position too")
    device = keys[0].device
    positions = torch.tensor(_PROBE_POSITIONS, device=device)
    cos_sin = [table.cos_sin(positions, model.dtype) for table in tables]
    known: dict[tuple[int, ...], list[_Layout]] = {}
    layouts: list[_Layout | None] = []
    for key in keys:
        if _spread(key) <= tolerance / 10:  # a layer without positions
            layouts.append(None)
            continue
        shape = tuple(key.shape[2:])
        candidates = known.setdefault(shape, list(_candidates(cos_sin, key.shape[-1])))
        errors = [_misfit(layout, key, *cos_sin[layout.table]) for layout in candidates]
        best = min(range(len(errors)), key=errors.__getitem__, default=-1)
        if best < 0 or errors[best] > tolerance:
            raise _refusal(model, "how it turns them is not known")
        layouts.append(candidates[best])
    return KeyRotation(tables, layouts, model.dtype)


def _refusal(model: ModelRunner, why: str) -> ModelError:
    return ModelError(
        f"model type {model.model_type}: keys of a chunk cannot be moved to another position ({why}); "
        "set chunks.reuse to exact or off."
    )


class _AloneProbe:
    """Every token sees itself alone: its attention is its own value."""

    logit_rows: Tensor | None = None

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        self.keys.append(key.transpose(0, 1).clone())
        self.values.append(value.transpose(0, 1).clone())
        return value.transpose(0, 1).repeat_interleave(query.shape[0] // value.shape[0], dim=1)


def _probe(model: ModelRunner) -> tuple[list[Tensor], list[Tensor]]:
    """K and V of every layer, [positions, tokens, heads, dim], float32."""
    vocabulary = int(model.text_config.vocab_size)
    tokens = torch.linspace(1, vocabulary - 1, _PROBE_TOKENS).long()
    positions = torch.tensor(_PROBE_POSITIONS)
    device = next(model.model.parameters()).device
    probe = _AloneProbe()
    with attention_of(probe):
        model.model(
            input_ids=tokens.repeat(len(positions)).unsqueeze(0).to(device),
            position_ids=positions.repeat_interleave(len(tokens)).unsqueeze(0).to(device),
            use_cache=False,
            logits_to_keep=1,
        )

    def by_position(states: Tensor) -> Tensor:
        return states.float().view(len(positions), len(tokens), *states.shape[1:])

    return [by_position(key) for key in probe.keys], [by_position(value) for value in probe.values]


def _tables_of(model: nn.Module) -> Iterator[_Table]:
    for module in model.modules():
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        parameters = inspect.signature(module.forward).parameters
        if "layer_type" in parameters:
            layer_types: Any = getattr(module, "rope_type", None) or getattr(module, "layer_types", ())
            for layer_type in layer_types:
                yield _Table(module, layer_type)
        elif "position_ids" in parameters:
            yield _Table(module, None)


def _candidates(cos_sin: Sequence[tuple[Tensor, Tensor]], dim: int) -> Iterator[_Layout]:
    for number, (cos, _) in enumerate(cos_sin):
        width = cos.shape[1]
        for columns, frequencies in (("half", width // 2), ("all", width), ("even", width // 2)):
            if not 0 < 2 * frequencies <= dim:
                continue
            for first in sorted({0, dim - 2 * frequencies}):
                for neighbours in (False, True):
                    yield _Layout(number, columns, first, frequencies, neighbours)


def _misfit(layout: _Layout, key: Tensor, cos: Tensor, sin: Tensor) -> float:
    """How far the keys [positions, tokens, heads, dim] are from those of the first position, turned."""
    count, tokens, heads, dim = key.shape
    unturned = _turn(layout, key[0], cos[:1].expand(tokens, -1), sin[:1].expand(tokens, -1), back=True)
    flat = unturned.expand(count, tokens, heads, dim).reshape(-1, heads, dim)
    turned = _turn(
        layout, flat, cos.repeat_interleave(tokens, 0), sin.repeat_interleave(tokens, 0), back=False
    )
    return _distance(turned.view_as(key), key)


def _spread(states: Tensor) -> float:
    return _distance(states, states[:1].expand_as(states))


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def _turn(layout: _Layout, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Multiplies each pair by (cos, -sin; sin, cos), or by its inverse. Computed in float32."""
    cos, sin = (layout.of_frequencies(table).unsqueeze(1) for table in (cos, sin))
    if back:
        size = cos.square() + sin.square()
        cos, sin = cos / size, -sin / size
    one, other = (part.float() for part in layout.pairs(key))
    turned = key.clone()
    into_one, into_other = layout.pairs(turned)
    into_one.copy_(one * cos - other * sin)
    into_other.copy_(other * cos + one * sin)
    return turned
