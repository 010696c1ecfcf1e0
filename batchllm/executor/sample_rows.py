"""How each row of a step's logits is sampled, as arrays, and the choice itself on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from batchllm_kernels.kernel_set import KernelSet
from numpy.typing import NDArray
from torch import Tensor

from batchllm.executor.running import Running
from batchllm.executor.upload import upload_as


@dataclass(frozen=True)
class SampleRows:
    """On the host; one entry a row."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    keys: NDArray[np.uint64]  # [n, 2]
    indices: NDArray[np.int64]  # of the token to choose
    wants_logprobs: bool

    @classmethod
    def of(cls, runs: Sequence[Running], keys: NDArray[np.uint64]) -> SampleRows:
        """keys [n, 2] of the sequences' first requests. Each chooses the token after those it has, pending or not."""
        params = [run.params for run in runs]
        return cls(
            temperature=np.array(
                [0.0 if one.greedy else one.temperature for one in params], dtype=np.float32
            ),
            top_k=np.array([one.top_k for one in params], dtype=np.int32),
            top_p=np.array([one.top_p for one in params], dtype=np.float64),
            min_p=np.array([one.min_p for one in params], dtype=np.float64),
            keys=keys,
            indices=np.array([run.decoded for run in runs], dtype=np.int64),
            wants_logprobs=any(one.logprobs for one in params),
        )

    @property
    def greedy(self) -> bool:
        return not self.temperature.any()


class DeviceRows:
    """SampleRows on the device, with room for `rows` of them."""

    def __init__(self, rows: int, device: torch.device):
        self.temperature = torch.zeros(rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self.top_p = torch.ones(rows, dtype=torch.float64, device=device)
        self.min_p = torch.zeros(rows, dtype=torch.float64, device=device)
        self.keys = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.indices = torch.zeros(rows, dtype=torch.int64, device=device)

    @classmethod
    def of(cls, host: SampleRows, device: torch.device) -> DeviceRows:
        made = cls(len(host.indices), device)
        made.load(host)
        return made

    def load(self, host: SampleRows) -> None:
        """Into the first rows; the others choose greedily."""
        used = len(host.indices)
        for mine, given in (
            (self.temperature, host.temperature),
            (self.top_k, host.top_k),
            (self.top_p, host.top_p),
            (self.min_p, host.min_p),
            (self.keys, host.keys.view(np.int64)),
            (self.indices, host.indices),
        ):
            mine[:used] = upload_as(given, mine.dtype, mine.device)
        self.temperature[used:] = 0.0

    def choose(self, logits: Tensor, greedy: bool, kernels: KernelSet) -> Tensor:
        """[n, V] → int64 [n]. `greedy`: every row is, which is known to the host."""
        if greedy:
            return logits.argmax(dim=-1)  # the first of equals
        chosen: Tensor = kernels.sample_tokens(
            logits, self.temperature, self.top_k, self.top_p, self.min_p, self.keys, self.indices
        )
        return chosen
