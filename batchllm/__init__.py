"""BatchLLM: offline batch inference for LLMs. Every prompt is known before the first token is computed.

import batchllm

run = batchllm.run("job.yaml", overrides={"generate.max_tokens": 32})   # → RunSummary: .table, .metrics
llm = batchllm.LLM(model="path/to/model")                               # vLLM's offline calling convention
outputs = llm.generate(prompts, batchllm.SamplingParams(max_tokens=64, temperature=0.0))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchllm.api import run
    from batchllm.llm import LLM
    from batchllm.llm_arguments import TextPrompt, TokensPrompt
    from batchllm.llm_outputs import CompletionOutput, RequestOutput
    from batchllm.llm_params import SamplingParams, StructuredOutputsParams
    from batchllm.pipeline import RunSummary

__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestOutput",
    "RunSummary",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "run",
]

_HOMES = {
    "LLM": "batchllm.llm",
    "CompletionOutput": "batchllm.llm_outputs",
    "RequestOutput": "batchllm.llm_outputs",
    "SamplingParams": "batchllm.llm_params",
    "StructuredOutputsParams": "batchllm.llm_params",
    "TextPrompt": "batchllm.llm_arguments",
    "TokensPrompt": "batchllm.llm_arguments",
    "RunSummary": "batchllm.pipeline",
    "run": "batchllm.api",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `batchllm --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'batchllm' has no attribute {name!r}")
    from importlib import import_module

    from batchllm.collection import no_collection

    with no_collection():
        return getattr(import_module(_HOMES[name]), name)
