"""Several linear layers with one input as one layer, and their weights as parts of its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def join_linears(*linears: nn.Linear) -> nn.Linear:
    """One linear whose output is theirs, one after another. Their weights become views of its weight."""
    outputs = sum(linear.out_features for linear in linears)
    bias = joined_bias(*linears)
    joined = nn.Linear(linears[0].in_features, outputs, bias=bias is not None, device="meta")
    weight = torch.cat([linear.weight.data for linear in linears])
    joined.weight = nn.Parameter(weight, requires_grad=False)
    joined.bias = bias  # type: ignore[assignment]
    share_rows(weight, *linears)
    return joined


def joined_bias(*linears: nn.Linear) -> nn.Parameter | None:
    """Their biases one after another; None where they have none."""
    if linears[0].bias is None or len(linears) == 1:
        return linears[0].bias
    return nn.Parameter(torch.cat([linear.bias.data for linear in linears]), requires_grad=False)


def share_rows(weight: Tensor, *linears: nn.Linear) -> None:
    """Makes the rows of `weight`, in order, the linears' weights."""
    first = 0
    for linear in linears:
        linear.weight = nn.Parameter(weight.data[first : first + linear.out_features], requires_grad=False)
        first += linear.out_features
