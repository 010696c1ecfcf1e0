"""How KV is written to memory or disk: as it is, or in fewer bits.

    raw    the model's own number format: nothing is lost
    bf16   16 bits
    fp8    8 bits floating point (e4m3), one scale per head
    int8   8 bits, one scale per channel and 64 tokens (K) or per token and head (V)
    int4   4 bits, scale and offset in the same groups, the 2% of values that stick out most kept apart in 16 bits

K before RoPE has channels that are large in every token; V has none. So K is scaled by channel and V by token (Liu et
al., KIVI, 2024). Keeping outliers apart is GEAR's idea (Kang et al., 2024); its low-rank correction is not used here.

States are [tokens, heads, dim]. What a codec writes has a length that follows from the shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from batchllm.chunkcache.quantize import Groups, dequantize, num_group_bytes, quantize

Kind = Literal["key", "value"]

_FP8 = torch.float8_e4m3fn
_ALIGN = 16
_MANY_TOKENS = 6400


class Codec(Protocol):
    """Works on any device; what it writes is where the states were."""

    name: str

    def num_bytes(self, tokens: int, heads: int, dim: int, kind: Kind) -> int:
        """Exact length of what `encode` writes, a multiple of 16."""
        ...

    def encode(self, states: Tensor, kind: Kind) -> Tensor:
        """[tokens, heads, dim] → uint8 [num_bytes]. At least one token; every value must be finite."""
        ...

    def decode(
        self, data: Tensor, tokens: int, heads: int, dim: int, kind: Kind, dtype: torch.dtype
    ) -> Tensor:
        """What `encode` wrote, or something close to it, as `dtype`."""
        ...


@dataclass(frozen=True)
class Encoded:
    """States and the codec that wrote them."""

    codec: Codec
    kind: Kind
    shape: tuple[int, int, int]  # tokens, heads, dim
    data: Tensor  # uint8

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self.codec.decode(self.data, *self.shape, self.kind, dtype)


def encode(codec: Codec, states: Tensor, kind: Kind) -> Encoded:
    tokens, heads, dim = states.shape
    return Encoded(codec, kind, (tokens, heads, dim), codec.encode(states, kind))


def bytes_per_token(codec: Codec, heads: int, key_dim: int, value_dim: int) -> float:
    """K and V of one token of one layer, in a long stretch."""
    key = codec.num_bytes(_MANY_TOKENS, heads, key_dim, "key")
    value = codec.num_bytes(_MANY_TOKENS, heads, value_dim, "value")
    return (key + value) / _MANY_TOKENS


class PlainCodec:
    """The numbers themselves, in some floating-point format."""

    def __init__(self, name: str, dtype: torch.dtype):
        self.name, self.dtype = name, dtype

    def num_bytes(self, tokens: int, heads: int, dim: int, kind: Kind) -> int:
        return _aligned(tokens * heads * dim * self.dtype.itemsize)

    def encode(self, states: Tensor, kind: Kind) -> Tensor:
        return _joined(states.to(self.dtype))

    def decode(
        self, data: Tensor, tokens: int, heads: int, dim: int, kind: Kind, dtype: torch.dtype
    ) -> Tensor:
        count = tokens * heads * dim * self.dtype.itemsize
        return data[:count].view(self.dtype).view(tokens, heads, dim).to(dtype)


class Fp8Codec:
    """e4m3, scaled so that the largest value of each head is the largest that the format has."""

    name = "fp8"

    def num_bytes(self, tokens: int, heads: int, dim: int, kind: Kind) -> int:
        return _aligned(4 * heads + tokens * heads * dim)

    def encode(self, states: Tensor, kind: Kind) -> Tensor:
        most = torch.finfo(_FP8).max
        largest = states.float().abs().amax(dim=(0, 2), keepdim=True)
        scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / most
        scaled = (states.float() / scale).clamp(-most, most)
        return _joined(scale, scaled.to(_FP8))

    def decode(
        self, data: Tensor, tokens: int, heads: int, dim: int, kind: Kind, dtype: torch.dtype
    ) -> Tensor:
        scale = data[: 4 * heads].view(torch.float32).view(1, heads, 1)
        end = 4 * heads + tokens * heads * dim
        scaled = data[4 * heads : end].view(_FP8).view(tokens, heads, dim)
        return (scaled.float() * scale).to(dtype)


class IntCodec:
    """Whole numbers of a few bits in groups; `quantize` has the arithmetic."""

    def __init__(self, name: str, bits: int, keep_outliers: bool):
        self.name, self.bits, self.keep_outliers = name, bits, keep_outliers

    def num_bytes(self, tokens: int, heads: int, dim: int, kind: Kind) -> int:
        return _aligned(num_group_bytes(self._groups(tokens, heads, dim, kind)))

    def encode(self, states: Tensor, kind: Kind) -> Tensor:
        tokens, heads, dim = states.shape
        groups = self._groups(tokens, heads, dim, kind)
        return _joined(*quantize(groups.split(states.float()), groups))

    def decode(
        self, data: Tensor, tokens: int, heads: int, dim: int, kind: Kind, dtype: torch.dtype
    ) -> Tensor:
        groups = self._groups(tokens, heads, dim, kind)
        return groups.join(dequantize(data, groups)).to(dtype)

    def _groups(self, tokens: int, heads: int, dim: int, kind: Kind) -> Groups:
        return Groups(tokens, heads, dim, kind == "key", self.bits, self.keep_outliers)


CODEC_NAMES = ("raw", "bf16", "fp8", "int8", "int4")


def codec_named(name: str, dtype: torch.dtype) -> Codec:
    """`dtype`: of the model. Raises KeyError for a name that is not one of CODEC_NAMES."""
    codecs: dict[str, Codec] = {
        "raw": PlainCodec("raw", dtype),
        "bf16": PlainCodec("bf16", torch.bfloat16),
        "fp8": Fp8Codec(),
        "int8": IntCodec("int8", 8, keep_outliers=False),
        "int4": IntCodec("int4", 4, keep_outliers=True),
    }
    return codecs[name]


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _joined(*parts: Tensor) -> Tensor:
    """The bytes of the parts, one after another, filled up to a multiple of 16."""
    flat = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
    size = sum(part.numel() for part in flat)
    if missing := _aligned(size) - size:
        flat.append(torch.zeros(missing, dtype=torch.uint8, device=flat[0].device))
    return torch.cat(flat)
