"""Tasks through the harness with all their prompts planned together.

The harness asks for one kind of answer after another, task by task. So every task runs twice: the first time to learn
what it will ask for, with a model that gives empty answers; then all of it is computed in one run, and the second time
the answers are ready.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from batchllm.evals.eval_job import EvalSpec
from batchllm.evals.harness_model import REQUEST_TYPES, BatchLM
from batchllm.evals.tasks import quiet

_BOOTSTRAP_ITERATIONS = 200  # for the standard error of what is not a mean


@dataclass
class TaskRuns:
    """The harness's results of each task, and one sentence for each task that has none."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task
    errors: dict[str, str] = field(default_factory=dict)  # by task


def run_tasks(model: BatchLM, tasks: Mapping[str, Any], spec: EvalSpec) -> TaskRuns:
    """A task that fails does not stop the others."""
    runs = TaskRuns()
    recorder = _Recorder(model)
    for name, task in tasks.items():
        before = recorder.count
        try:
            _evaluate(recorder, name, task, spec, bootstrap=0)
        except Exception as error:  # templates and metrics of a task raise what they like
            if recorder.count == before:
                runs.errors[name] = _sentence(name, error)
    model.run_ahead(recorder.requests)
    for name, task in tasks.items():
        if name in runs.errors:
            continue
        try:
            runs.results[name] = _evaluate(model, name, task, spec, bootstrap=_BOOTSTRAP_ITERATIONS)
        except Exception as error:
            runs.errors[name] = _sentence(name, error)
    return runs


def _sentence(name: str, error: Exception) -> str:
    return f"task `{name}` cannot be evaluated: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _evaluate(model: LM, name: str, task: Any, spec: EvalSpec, bootstrap: int) -> dict[str, Any]:
    random.seed(spec.seed)
    np.random.seed(spec.seed)
    if spec.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 is the task's own word
        task.set_config(key="num_fewshot", value=spec.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=spec.seed)
    with quiet():
        results = evaluate(
            model,
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=spec.limit,
            apply_chat_template=spec.chat_template,
            fewshot_as_multiturn=spec.chat_template,
            system_instruction=spec.system,
            bootstrap_iters=bootstrap,
        )
    assert results is not None, "this is the only process"
    return dict(results)


class _Recorder(LM):  # type: ignore[misc]
    """Keeps what it is asked for and gives empty answers. Templates are the real model's."""

    def __init__(self, model: BatchLM):
        super().__init__()
        self._model = model
        self.requests: dict[str, list[Instance]] = {kind: [] for kind in REQUEST_TYPES}

    @property
    def count(self) -> int:
        return sum(map(len, self.requests.values()))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.requests["loglikelihood"] += requests
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        self.requests["loglikelihood_rolling"] += requests
        return [0.0] * len(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.requests["generate_until"] += requests
        return [""] * len(requests)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._model.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> Any:
        return self._model.chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        return self._model.tokenizer_name
