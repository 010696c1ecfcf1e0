"""A job as a script for vLLM: prompts from a Parquet file, answers to another; run by vLLM's own interpreter.

python -m benchmarks.job_vllm MODEL PROMPTS ANSWERS MAX_TOKENS EAGER(0|1)
"""

from __future__ import annotations

import os
import sys

# One process: a second one for the engine would start later still.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pyarrow as pa
import pyarrow.parquet as pq
from vllm import LLM, SamplingParams


def main(model: str, prompts: str, answers: str, max_tokens: str, eager: str) -> None:
    table = pq.read_table(prompts)
    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=256,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=4 << 30,
        enforce_eager=eager == "1",
        disable_log_stats=True,
    )
    params = SamplingParams(temperature=0, max_tokens=int(max_tokens), ignore_eos=True)
    outputs = llm.generate(table.column("prompt").to_pylist(), params)
    texts = pa.array([output.outputs[0].text for output in outputs])
    pq.write_table(table.append_column("output", texts), answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
