"""One transformers model, run on flat ragged batches through our attention function."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from batchllm.errors import ModelError, first_line
from batchllm.executor.backend import Backend
from batchllm.executor.device import Placement
from batchllm.executor.forward_context import (
    ATTENTION_NAME,
    StepAttention,
    UnsupportedAttention,
    attention_of,
    register,
)
from batchllm.executor.fused_layer import fuse_layers, restore_layers
from batchllm.executor.gate import LengthLimit, refused
from batchllm.executor.greedy_head import GreedyHead
from batchllm.executor.kv_buffers import LayerKv
from batchllm.executor.model_config import load_config
from batchllm.executor.native import native_kernels
from batchllm.executor.packed_linear import pack_linears, pack_projection, unpack_linears
from batchllm.executor.step import StepBatch

if TYPE_CHECKING:
    from batchllm.executor.device_model import DeviceModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelRunner:
    """A loaded model that passed the gate. `layers` is the KV shape of each layer, `backend` what its steps use."""

    def __init__(self, model: Any, limit: LengthLimit | None = None, placement: Placement | None = None):
        placement = placement or Placement()
        self.placement = placement
        self.backend: Backend = placement.backend()
        self.device = placement.device
        self.model: Any = model.eval().to(self.device)
        self.config: Any = self.model.config
        self.text_config: Any = self.config.get_text_config()
        self.limit = limit
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.layers = self._probe_layers()
        self.fused = False
        self.device_model: DeviceModel | None = None

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def vocab_size(self) -> int:
        """Logits of one row."""
        return int(self.text_config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """Most tokens a sequence may have (prompt and output), if the model states one."""
        stated = getattr(self.text_config, "max_position_embeddings", None)
        return int(stated) if stated else None

    @property
    def exact_length(self) -> int | None:
        """`max_length`, or what the architecture is exact for, if that is less: no step may have a position beyond."""
        lengths = [self.max_length, self.limit and self.limit.tokens]
        return min((length for length in lengths if length), default=None)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, attention: StepAttention) -> Tensor:
        """Logits of `batch.logit_rows`, [L, vocabulary], float32."""
        tokens, positions = self._on_device(batch.tokens), self._on_device(batch.positions)
        return self.logits(tokens, positions, attention, self._on_device(batch.logit_rows)).float()

    @torch.inference_mode()
    def logits(
        self, tokens: Tensor, positions: Tensor, attention: StepAttention, logit_rows: Tensor | None
    ) -> Tensor:
        """tokens, positions int64 [T] on the device → [L, vocabulary] of `logit_rows`, or of all, in its dtype."""
        if self.device_model is not None and hasattr(attention, "attend_written"):
            return self.device_model.logits(tokens, cast(Any, attention), logit_rows)
        keeps_all = logit_rows is None or self._returns_last(attention)
        with attention_of(attention):
            output = self.model(
                input_ids=tokens.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=0 if keeps_all else logit_rows,
            )
        logits: Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def greedy_tokens(self, batch: StepBatch, attention: StepAttention) -> NDArray[np.int64] | None:
        """Of `batch.logit_rows` [L] the token with the largest logit, the first of equals; None where there is no
        faster way to it than all logits, and nothing has been computed."""
        head = self.greedy_head
        if head is None or not head.pays:
            return None
        tokens, positions = self._on_device(batch.tokens), self._on_device(batch.positions)
        with attention_of(attention):
            output = self._base(
                input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False
            )
        states: Tensor = output.last_hidden_state[0]
        if not self._returns_last(attention):
            states = states[self._on_device(batch.logit_rows)]
        return head.tokens(states)

    @cached_property
    def greedy_head(self) -> GreedyHead | None:
        """Made when first asked for: its weights take memory."""
        return GreedyHead.of(self.model) if self.placement.gpu is None else None

    @property
    def _base(self) -> Any:
        """What is below the output projection."""
        return getattr(self.model, self.model.base_model_prefix)

    def _returns_last(self, attention: StepAttention) -> bool:
        """Whether the last layer returns only the tokens with logits, as fused layers do where they can."""
        return self.fused and self.device_model is None and attention.logit_rows is not None

    @torch.inference_mode()
    def forward_in_slices(
        self, batch: StepBatch, attention: StepAttention, rows: int
    ) -> Iterator[tuple[int, Tensor]]:
        """The logits that `forward` gives, at most `rows` rows at once: (number of the first row, [n, V])."""
        wanted = self._on_device(batch.logit_rows)
        if self._returns_last(attention):
            wanted = torch.arange(len(wanted), device=self.device)
        # The base runs once; the output projection, with all that a model does after it
        # (scaling, capping), runs for each slice.
        base = self._base
        outputs: list[Any] = []
        hook = base.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        tokens, positions = self._on_device(batch.tokens), self._on_device(batch.positions)
        try:
            for first in range(0, len(wanted), rows):
                with attention_of(attention):
                    output = self.model(
                        input_ids=tokens.unsqueeze(0),
                        position_ids=positions.unsqueeze(0),
                        use_cache=False,
                        logits_to_keep=wanted[first : first + rows],
                    )
                base.forward = lambda *_arguments, **_named: outputs[0]
                yield first, output.logits[0].float()
        finally:
            hook.remove()
            vars(base).pop("forward", None)

    def fuse(self, packed: bool = False) -> bool:
        """Swaps in faster decoder layers where they match; on a GPU, a faster forward pass. Returns whether it did.

        `packed`: with weights as `pack` keeps them.
        """
        if self.fused:
            return True
        if self.placement.gpu is None:
            self.fused = fuse_layers(self.model, native_kernels(self.dtype) if packed else None)
            if self.fused and packed:
                self.pack()
        else:
            from batchllm.executor.device_model import DeviceModel

            kernels = cast(Any, self.backend).kernels
            self.device_model = DeviceModel.of(self.model, kernels, self.max_length)
            self.fused = self.device_model is not None
        return self.fused

    def pack(self, projection_only: bool = False) -> None:
        """Keeps the weights of linear layers in the form that a CPU multiplies fastest with. `unfuse` undoes it.

        `projection_only`: those of the output projection, where the layers have been quantised.
        """
        if self.placement.gpu is None:
            (pack_projection if projection_only else pack_linears)(self.model, native_kernels(self.dtype))
        vars(self).pop("greedy_head", None)

    def unfuse(self) -> None:
        """Back to transformers' own layers."""
        unpack_linears(self.model)
        vars(self).pop("greedy_head", None)
        if self.fused and self.device_model is None:
            restore_layers(self.model)
        self.device_model = None
        self.fused = False

    def _on_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _probe_layers(self) -> tuple[LayerKv, ...]:
        """Runs two tokens to see which layers call attention, once each and with which KV shape."""
        probe = _ShapeProbe()
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        positions = torch.arange(2, device=self.device).unsqueeze(0)
        try:
            with attention_of(probe), torch.inference_mode():
                self.model(input_ids=tokens, position_ids=positions, use_cache=False)
        except UnsupportedAttention as error:
            raise refused(self.model_type, str(error)) from None
        count = int(self.text_config.num_hidden_layers)
        if [layer for layer, _ in probe.seen] != list(range(count)):
            raise refused(self.model_type, f"not each of its {count} layers calls attention exactly once")
        return tuple(shape for _, shape in probe.seen)


class _ShapeProbe:
    logit_rows: Tensor | None = None

    def __init__(self) -> None:
        self.seen: list[tuple[int, LayerKv]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        self.seen.append((layer, LayerKv(key.shape[0], key.shape[-1], value.shape[-1])))
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])


def load_model(
    path: str, dtype: str = "auto", trust_remote_code: bool = False, placement: Placement | None = None
) -> ModelRunner:
    """Loads safetensors weights and checks that this model can run exactly. `dtype` as ModelSpec has it.

    Raises ModelError.
    """
    register()
    config, limit = load_config(path, trust_remote_code)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype="auto" if dtype == "auto" else _DTYPES[dtype],
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"model.path: {path} {_why_not_loaded(config, error)}") from None
    model, report = loaded
    if report["missing_keys"]:  # transformers fills them with random numbers and only warns
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"model.path: {path} lacks {len(missing)} of the model's weights ({missing[0]} ...); "
            f"copy all of its safetensors files."
        )
    try:
        return prepare_model(model, limit, placement)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"model.path: the weights of {path} do not fit in the GPU's memory; choose a smaller model.dtype "
            f"or set engine.device to cpu."
        ) from None


def _why_not_loaded(config: Any, error: Exception) -> str:
    """What transformers says; of a checkpoint whose weights are quantised already, how, and what else to give."""
    stated: Any = getattr(config, "quantization_config", None) or {}
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    if method is None:
        return f"cannot be loaded: {first_line(error)}"
    return (
        f"has weights quantised with {method}, which cannot be loaded here: {first_line(error)}; or give the model "
        f"as it was before (model.quantize quantises it on a CPU)."
    )


def prepare_model(
    model: Any, limit: LengthLimit | None = None, placement: Placement | None = None
) -> ModelRunner:
    """Wraps a model that is already in memory; its attention is switched to ours."""
    register()
    model_type = model.config.model_type
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise refused(model_type, "transformers does not let its attention be replaced")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise refused(model_type, "its forward cannot return the logits of chosen tokens only")
    return ModelRunner(model, limit, placement)
