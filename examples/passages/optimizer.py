"""Muon for the matrices, AdamW for everything else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SUBMATRICES = {"query_key_value": 3, "gate_up": 2}  # fused weights are orthogonalized part by part


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix of a stack [count, rows, columns] close to 1."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum whose update is orthogonalized; matrices of one shape are handled as one stack."""

    def __init__(
        self, named: dict[str, nn.Parameter], rate: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        self._named = named
        self._rate, self._momentum, self._decay = rate, momentum, decay
        self._averages = {name: torch.zeros_like(weight) for name, weight in named.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Apply one update at ``factor`` times the rate; gradients are left in place."""
        stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for name, weight in self._named.items():
            assert weight.grad is not None
            average = self._averages[name].lerp_(weight.grad, 1 - self._momentum)
            update = weight.grad.lerp(average, self._momentum)
            parts = SUBMATRICES.get(name.rsplit(".", 1)[-1], 1)
            for part, part_update in zip(weight.chunk(parts), update.chunk(parts)):
                stacks.setdefault(part.shape, []).append((part, part_update))
        rate = factor * self._rate
        for shape, members in stacks.items():
            directions = orthogonalize(torch.stack([update for _, update in members]))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for (part, _), direction in zip(members, directions):
                part.mul_(1 - rate * self._decay).add_(direction, alpha=-rate * scale)

    def state_dict(self) -> dict[str, Tensor]:
        return self._averages

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self._averages.items():
            average.copy_(state[name])


class Optimizer:
    """Both optimizers behind one step; ``factor`` is the place in the learning rate schedule, 0 to 1."""

    def __init__(self, model: nn.Module, muon_rate: float, adam_rate: float) -> None:
        named = dict(model.named_parameters())
        matrices = {
            name: weight for name, weight in named.items() if weight.ndim == 2 and name != "embedding"
        }
        self._rest = [weight for name, weight in named.items() if name not in matrices]
        self._adam_rate = adam_rate
        self._muon = Muon(matrices, muon_rate)
        self._adam = torch.optim.AdamW(
            self._rest, lr=adam_rate, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0
        )

    def step(self, factor: float) -> None:
        nn.utils.clip_grad_norm_(self._rest, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = factor * self._adam_rate
        self._muon.step(factor)
        self._adam.step()

    def state_dict(self) -> dict[str, object]:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
