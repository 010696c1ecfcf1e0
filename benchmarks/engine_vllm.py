"""vLLM's CPU build as an engine of the comparison; run by the interpreter of its own environment."""

from __future__ import annotations

import os
import time

# Before vllm is imported. In this very process, so that stopping the process stops all of it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import json
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt

from benchmarks.result import EngineResult
from benchmarks.worker import Run, Settings, serve
from benchmarks.workloads import Workload

STEP_TOKENS = 4096
BLOCK_TOKENS = 128  # vLLM's default on a CPU


def start(settings: Settings) -> Run:
    config = json.loads((Path(settings.model) / "config.json").read_text())
    llm = LLM(
        model=settings.model,
        skip_tokenizer_init=True,
        dtype=config["dtype"],
        enable_prefix_caching=True,
        max_model_len=settings.max_length,
        max_num_seqs=256,
        max_num_batched_tokens=settings.step_tokens or STEP_TOKENS,
        enforce_eager=settings.eager,
        disable_log_stats=True,
        # One block is never used for tokens; it comes on top, so that as many tokens fit as elsewhere.
        kv_cache_memory_bytes=settings.kv_bytes + BLOCK_TOKENS * _kv_bytes_per_token(config),
    )

    def run(workload: Workload) -> EngineResult:
        if not llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied")
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in workload.prompts]
        params = SamplingParams(
            max_tokens=workload.max_tokens, ignore_eos=True, temperature=0, detokenize=False
        )
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        return EngineResult("vllm", seconds, tokens, {"prompt_tokens_cached": cached})

    return run


def _kv_bytes_per_token(config: dict[str, int | str]) -> int:
    head = int(config["hidden_size"]) // int(config["num_attention_heads"])
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[str(config["dtype"])]
    return 2 * int(config["num_hidden_layers"]) * int(config["num_key_value_heads"]) * head * width


if __name__ == "__main__":
    serve(start)
