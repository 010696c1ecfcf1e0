"""Several linear layers with one input as one layer, and their weights as parts of its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def join_linears(*linears: nn.Linear) -> nn.Linear:
    """One linear whose output is theirs, one after another. Their weights become views of its weight."""
    outputs = sum(linear.out_features for linear in linears)
    biased = linears[0].bias is not None
    joined = nn.Linear(linears[0].in_features, outputs, bias=biased, device="meta")
    weight = torch.cat([linear.weight.data for linear in linears])
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if biased:
        joined.bias = nn.Parameter(torch.cat([linear.bias.data for linear in linears]), requires_grad=False)
    share_rows(weight, *linears)
    return joined


def share_rows(weight: Tensor, *linears: nn.Linear) -> None:
    """Makes the rows of `weight`, in order, the linears' weights."""
    first = 0
    for linear in linears:
        linear.weight = nn.Parameter(weight.data[first : first + linear.out_features], requires_grad=False)
        first += linear.out_features
