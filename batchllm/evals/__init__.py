"""Evaluation with lm-evaluation-harness: its model class for BatchLLM, `batchllm eval`, and nightly comparison."""
