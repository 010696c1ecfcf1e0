"""BatchLLM for lm-evaluation-harness: `simple_evaluate(model=BatchLM("path/to/model"), tasks=[...])`.

Importing this module also registers the name: `simple_evaluate(model="batchllm", model_args="pretrained=...")`.
"""

from batchllm.evals.harness_model import BatchLM

__all__ = ["BatchLM"]
