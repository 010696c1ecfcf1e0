"""Log-likelihoods of pairs with vLLM's CPU build; run by the interpreter of its own environment. See evals.py."""

from __future__ import annotations

import os

# Before vllm is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt

_STEP_TOKENS = 4096
_KV_BYTES = 1 << 30


def main() -> None:
    model, asked, answered = sys.argv[1:4]
    pairs = json.loads(Path(asked).read_text())
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,  # as by default; it does not serve requests for prompt log-probabilities
        max_model_len=max(len(context) + len(continuation) for context, continuation in pairs) + 1,
        max_num_seqs=256,
        max_num_batched_tokens=_STEP_TOKENS,
        disable_log_stats=True,
        kv_cache_memory_bytes=_KV_BYTES,
    )
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=context + continuation) for context, continuation in pairs]
    llm.generate(prompts[:2], params, use_tqdm=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    logprobs = [
        sum(
            given[token].logprob
            for given, token in zip(output.prompt_logprobs[-len(continuation) :], continuation)
        )
        for output, (_, continuation) in zip(outputs, pairs, strict=True)
    ]
    Path(answered).write_text(json.dumps({"seconds": seconds, "logprobs": logprobs}))


if __name__ == "__main__":
    main()
