"""Groups of numbers as whole numbers of 8 or 4 bits, with a scale and, at 4 bits, an offset and outliers per group.

Written as: scales, offsets, outliers (float16 each), places of the outliers (uint8), the whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TOKENS_OF_A_GROUP = 64
_MOST_CHANNELS = 128
_ONE_OUTLIER_IN = 50
_HALF = torch.float16


@dataclass(frozen=True)
class Groups:
    """How states [tokens, heads, dim] are cut into groups.

    By channel: up to 64 tokens of one channel of one head, equally many in each group; the last group repeats the
    last token where tokens are missing. Else: up to 128 channels of one head of one token.
    """

    tokens: int
    heads: int
    dim: int
    by_channel: bool
    bits: int
    keep_outliers: bool

    @property
    def size(self) -> int:
        """Numbers in a group, even."""
        if self.by_channel:
            parts = -(-self.tokens // _TOKENS_OF_A_GROUP)
            tokens = -(-self.tokens // parts)
            return tokens + tokens % 2
        parts = -(-self.dim // _MOST_CHANNELS)
        while self.dim % parts or (self.dim // parts) % 2:
            parts += 1
            if parts > self.dim:
                raise ValueError(f"a head of {self.dim} channels cannot be cut into even groups")
        return self.dim // parts

    @property
    def count(self) -> int:
        if self.by_channel:
            return -(-self.tokens // self.size) * self.heads * self.dim
        return self.tokens * self.heads * self.dim // self.size

    @property
    def outliers(self) -> int:
        """Of each group."""
        return max(1, round(self.size / _ONE_OUTLIER_IN)) if self.keep_outliers else 0

    def split(self, states: Tensor) -> Tensor:
        """[tokens, heads, dim] → [count, size]."""
        if not self.by_channel:
            return states.reshape(self.count, self.size)
        missing = -self.tokens % self.size
        if missing:
            states = torch.cat([states, states[-1:].expand(missing, -1, -1)])
        cut = states.view(-1, self.size, self.heads, self.dim)
        return cut.permute(0, 2, 3, 1).reshape(self.count, self.size)

    def join(self, groups: Tensor) -> Tensor:
        """[count, size] → [tokens, heads, dim]."""
        if not self.by_channel:
            return groups.view(self.tokens, self.heads, self.dim)
        cut = groups.view(-1, self.heads, self.dim, self.size).permute(0, 3, 1, 2)
        return cut.reshape(-1, self.heads, self.dim)[: self.tokens]


def num_group_bytes(groups: Groups) -> int:
    per_group = 2 if groups.bits == 8 else 4 + 3 * groups.outliers
    return groups.count * (per_group + groups.size * groups.bits // 8)


def quantize(values: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """values [count, size], float32 → the parts in the order in which they are written."""
    if groups.bits == 8:
        scale = _half(values.abs().amax(dim=1, keepdim=True) / 127)
        return scale, _whole(values, scale, torch.zeros_like(values[:, :1]), -127, 127).to(torch.int8)
    # What sticks out is what is farthest from the middle; the middle then takes its place.
    middle = values.median(dim=1, keepdim=True).values
    place = (values - middle).abs().topk(groups.outliers, dim=1).indices
    outlier = values.gather(1, place)
    values = values.scatter(1, place, middle.expand(-1, groups.outliers))
    low = _half(values.amin(dim=1, keepdim=True))
    scale = _half((values.amax(dim=1, keepdim=True) - low.float()).clamp_min(0) / 15)
    whole = _whole(values, scale, low.float(), 0, 15).to(torch.uint8)
    packed = whole[:, 0::2] | (whole[:, 1::2] << 4)
    return scale, low, _half(outlier), place.to(torch.uint8), packed


def dequantize(data: Tensor, groups: Groups) -> Tensor:
    """What `quantize` made, joined → values [count, size], float32."""
    count, size, outliers = groups.count, groups.size, groups.outliers
    scale, data = _take(data, count, 1, _HALF)
    if groups.bits == 8:
        whole, _ = _take(data, count, size, torch.int8)
        return whole.float() * scale.float()
    low, data = _take(data, count, 1, _HALF)
    outlier, data = _take(data, count, outliers, _HALF)
    place, data = _take(data, count, outliers, torch.uint8)
    packed, _ = _take(data, count, size // 2, torch.uint8)
    whole = torch.stack((packed & 15, packed >> 4), dim=2).view(count, size)
    values = torch.addcmul(low.float(), whole.float(), scale.float())
    return values.scatter_(1, place.long(), outlier.float())


def _whole(values: Tensor, scale: Tensor, low: Tensor, least: int, most: int) -> Tensor:
    """Nearest whole numbers; a group whose scale is 0 is all alike."""
    step = torch.where(scale > 0, scale, 1).float()
    return ((values - low) / step).round_().clamp_(least, most)


def _half(values: Tensor) -> Tensor:
    most = torch.finfo(_HALF).max
    return values.clamp(-most, most).to(_HALF)


def _take(data: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first rows x columns numbers of the bytes, and the bytes after them."""
    size = rows * columns * dtype.itemsize
    return data[:size].view(dtype).view(rows, columns), data[size:]
