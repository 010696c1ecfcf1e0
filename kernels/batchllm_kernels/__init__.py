"""Triton kernels of BatchLLM. Importable alone: imports nothing of `batchllm`."""
