"""A model from its folder to the state in which it runs."""

from __future__ import annotations

from batchllm.errors import ModelError
from batchllm.executor.device import Placement
from batchllm.executor.model import ModelRunner, load_model
from batchllm.executor.parity import check_parity
from batchllm.executor.quantize import quantize_model


def load_ready_model(
    path: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement | None = None,
    quantize: str | None = None,
) -> ModelRunner:
    """Loaded, checked, with its fast layers in place, and its weights quantised or packed. Raises ModelError."""
    if quantize and placement is not None and placement.gpu is not None:
        raise ModelError(
            "model.quantize works on a CPU only: set engine.device: cpu or leave model.quantize out."
        )
    model = load_model(path, dtype, trust_remote_code, placement)
    check_parity(model, packed=not quantize)
    if quantize:
        quantize_model(model, quantize)
        model.pack(projection_only=True)
    return model
