"""The model class for lm-evaluation-harness against the harness's own `hf` class: the same scores and texts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
pytest.importorskip("accelerate", reason="the harness's hf model class needs accelerate")

from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from batchllm.evals.eval_job import EvalSpec
from batchllm.evals.harness_run import run_tasks
from batchllm.evals.tasks import load_tasks, quiet
from tests.evals.eval_worlds import (
    DATA,
    PASSAGES_MODEL,
    ROOT,
    harness_model,
    nightly_tasks,
    our_model,
    samples_of,
    write_small_tasks,
)

TOLERANCE = 1e-4
DOCUMENTS = int(os.environ.get("BATCHLLM_EVAL_DOCUMENTS", "2"))  # of each real task
# The harness adds up in float32, so beyond 400 its own sums are that far from the truth: two units in the last place.
FLOAT32 = 2.4e-7


def spec_of(folder: Path, tasks: list[Any], **others: Any) -> EvalSpec:
    return EvalSpec.model_validate({"tasks": tasks, "include": folder, "data": folder, **others})


def theirs(model: Path, tasks: Mapping[str, Any], spec: EvalSpec) -> dict[str, Any]:
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=spec.seed)
    with quiet():
        results = evaluate(
            harness_model(model),
            {"tasks": dict(tasks), "groups": {}, "group_map": {}},
            limit=spec.limit,
            bootstrap_iters=0,
            apply_chat_template=spec.chat_template,
            fewshot_as_multiturn=spec.chat_template,
            system_instruction=spec.system,
        )
    assert results is not None
    return dict(results)


def check(model: Path, spec: EvalSpec, max_gen_toks: int | None = None) -> None:
    loaded = load_tasks(spec)
    assert not loaded.errors
    for task in loaded.tasks.values():
        if max_gen_toks and task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": max_gen_toks}, update=True)
    ours = our_model(model)
    runs_before = ours.runs
    found = run_tasks(ours, loaded.tasks, spec)
    assert not found.errors
    assert not ours.faults
    assert ours.runs == runs_before + 1  # all prompts of all tasks were planned together
    expected = theirs(model, loaded.tasks, spec)
    for task, results in found.results.items():
        _same_samples(results, {"samples": {task: expected["samples"][task]}})
        for name, score in expected["results"][task].items():
            if isinstance(score, float) and "_stderr" not in name:
                assert results["results"][task][name] == pytest.approx(score, rel=1e-5), (task, name)


def _same_samples(results: dict[str, Any], expected: dict[str, Any]) -> None:
    for (task, doc, filtered, mine), (*name, other) in zip(
        samples_of(results), samples_of(expected), strict=True
    ):
        assert [task, doc, filtered] == name
        for answer, wanted in zip(mine, other, strict=True):
            if isinstance(wanted, tuple | list):
                assert answer[0] == pytest.approx(wanted[0], abs=TOLERANCE, rel=FLOAT32), (task, doc)
                assert answer[1] == wanted[1], (task, doc)
            elif isinstance(wanted, float):
                assert answer == pytest.approx(wanted, abs=TOLERANCE, rel=FLOAT32), (task, doc)
            else:
                assert answer == wanted, (task, doc)


@pytest.mark.parametrize("chat", [False, True])
def test_small_tasks_score_as_with_hf(model_folder: Path, tmp_path: Path, chat: bool) -> None:
    folder = write_small_tasks(tmp_path)
    tasks = ["choices", "answers", *([] if chat else ["documents"])]
    check(model_folder, spec_of(folder, tasks, chat_template=chat, system="Be brief." if chat else None))


@pytest.mark.skipif(not (DATA / "agieval").is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize("which", ["random", "passages"])
def test_real_tasks_score_as_with_hf(model_folder: Path, which: str) -> None:
    """The nine tasks of jobs/nightly_eval.yaml. Most contexts are cut from the left for the random model."""
    tasks = {"tasks": nightly_tasks(), "include": ROOT / "jobs" / "eval_tasks", "data": DATA}
    spec = EvalSpec.model_validate({**tasks, "limit": DOCUMENTS})
    assert len(spec.tasks) >= 8
    check(model_folder if which == "random" else PASSAGES_MODEL, spec, max_gen_toks=16)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, number, ("here", number, 1)) for number, pair in enumerate(arguments)]


def test_pairs_at_the_edges(model_folder: Path) -> None:
    """Empty contexts, trailing spaces, texts longer than the model: where the harness has a convention, it is kept."""
    pairs = [
        ("", "some text"),
        ("A context ", "and more"),
        ("x" * 600, " end"),
        ("<eos>begins", " so"),
        ("a", "b" * 500),
    ]
    requests = instances("loglikelihood", pairs)
    mine = our_model(model_folder).loglikelihood(requests)
    other = harness_model(model_folder).loglikelihood(requests, disable_tqdm=True)
    for answer, wanted in zip(mine, other, strict=True):
        assert answer[0] == pytest.approx(wanted[0], abs=TOLERANCE, rel=FLOAT32)
        assert answer[1] == wanted[1]


def test_a_pair_that_cannot_be_scored_is_named_and_the_others_go_on(model_folder: Path) -> None:
    ours = our_model(model_folder)
    with pytest.warns(UserWarning, match="task here, document 0, request 0: the continuation adds no token"):
        answers = ours.loglikelihood(instances("loglikelihood", [("Some", ""), ("Some", " more")]))
    assert answers[0] == (-float("inf"), False)
    assert answers[1][0] > -1000
    with pytest.warns(UserWarning, match="generation_kwargs.num_beams is not known"):
        assert ours.generate_until(instances("generate_until", [("Some", {"num_beams": 3})])) == [""]
    assert len(ours.faults) == 2
    ours.faults.clear()


def test_it_is_known_to_the_harness_by_name(model_folder: Path, tmp_path: Path) -> None:
    import lm_eval

    folder = write_small_tasks(tmp_path)
    loaded = load_tasks(spec_of(folder, ["choices"]))
    arguments = {"pretrained": str(model_folder), "dtype": "float32"}
    with quiet():
        results = lm_eval.simple_evaluate(
            "batchllm",
            arguments,
            tasks=list(loaded.tasks.values()),
            limit=2,
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),  # its own thousands of tasks take long to list
        )
    assert results is not None
    assert 0.0 <= results["results"]["choices"]["acc,none"] <= 1.0
