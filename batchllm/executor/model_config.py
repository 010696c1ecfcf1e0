"""Opens a model's configuration: no weights are read, and nothing that would need torch's model code is imported."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from batchllm.errors import ModelError, first_line
from batchllm.executor.gate import LengthLimit, check_config
from batchllm.planner.hardware import BYTES_PER_VALUE
from batchllm.planner.model_shape import model_shape


def load_config(path: str, trust_remote_code: bool) -> tuple[Any, LengthLimit | None]:
    """The model's configuration, checked by the gate. Cheap: no weights are read."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model.path: {path} cannot be opened as a model: {first_line(error)}") from None
    return config, check_config(config)


def weight_bytes(config: Any, dtype: str) -> int:
    """Bytes of the weights loaded as `dtype`, which is a name or auto."""
    name = str(getattr(config, "dtype", None) or "float32") if dtype == "auto" else dtype
    size = BYTES_PER_VALUE.get(name.removeprefix("torch."), BYTES_PER_VALUE["float32"])
    return model_shape(config.get_text_config()).weight_bytes(size)
