"""The job file of `batchllm eval`.

model:    as in every job file
engine:   as in every job file
output:   {path}                        a folder for this night; {date} in it is today's date
eval:     {tasks, include, data, limit, num_fewshot, chat_template, system, seed}
compare:  {previous, max_drop, significance}
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from batchllm.job_paths import absolute_path, folder_path, model_path, output_path
from batchllm.job_reading import blame, checked, parse_overrides, read_mapping, with_absolute_paths
from batchllm.job_sections import EngineSpec, ModelSpec, Section
from batchllm.job_values import Flag, Limit, PathText, Share, Text


class TaskSpec(Section):
    """One task: a name that the harness or `eval.include` knows, or a YAML file."""

    task: Text
    data: dict[str, Text] | None = None  # split → local file, in place of the task's own data
    field: Text | None = None  # of a JSON file: where its rows are


class EvalSpec(Section):
    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1)]
    include: Path | None = None  # a folder with YAML files of tasks
    data: Path | None = None  # the folder at which relative paths of data files start
    limit: Limit | None = None  # documents of each task
    num_fewshot: Limit | None = None
    chat_template: Flag = False
    system: Text | None = None
    seed: Limit = 1234

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_are_tasks(cls, value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [{"task": item} if isinstance(item, str) else item for item in value]
        return value


class EvalOutput(Section):
    path: PathText


class CompareSpec(Section):
    """When a score counts as a regression: worse by more than `max_drop`, and not by chance."""

    previous: PathText = "auto"  # a folder; auto: the last one beside output.path; none
    max_drop: Share = 0.01  # absolute for scores from 0 to 1, relative for others
    significance: Share = 0.05  # of the paired test


class EvalJob(Section):
    """Paths are absolute."""

    model: ModelSpec
    engine: EngineSpec = EngineSpec()
    eval: EvalSpec
    output: EvalOutput
    compare: CompareSpec = CompareSpec()


def load_eval_job(
    path: str | Path,
    overrides: Sequence[str] = (),
    previous: str | None = None,
    today: date | None = None,
) -> EvalJob:
    """Reads and checks a job file. `previous`, in place of `compare.previous`, starts at the working folder.

    Raises JobError of one sentence.
    """
    mapping = read_mapping(path, "model, eval and output")
    given = parse_overrides(overrides, _TEXT_KEYS)
    in_file = blame(str(path), given)
    if previous is not None:
        folder = previous if previous in _NO_FOLDERS else os.path.abspath(previous)
        given = [*given, (("compare", "previous"), folder)]

    def where(key: str) -> str:
        return "--previous" if previous is not None and key == "compare.previous" else in_file(key)

    job = checked(EvalJob, mapping, given, where)
    base_dir = Path(path).absolute().parent
    if job.eval.data is None:
        job = job.model_copy(update={"eval": job.eval.model_copy(update={"data": base_dir})})
    paths = (
        ("model", "path", model_path),
        ("eval", "include", folder_path),
        ("eval", "data", folder_path),
        ("eval", "tasks", _task_files),
        ("output", "path", partial(_night_path, today=today or date.today())),
        ("compare", "previous", _previous_path),
    )
    return with_absolute_paths(job, paths, base_dir, where)


def _task_files(tasks: Sequence[TaskSpec], base_dir: Path) -> tuple[TaskSpec, ...]:
    """Tasks that are YAML files beside the job file, by their paths."""
    found = []
    for task in tasks:
        file = Path(absolute_path(task.task, base_dir))
        is_file = file.suffix in (".yaml", ".yml") and file.is_file()
        found.append(task.model_copy(update={"task": str(file)}) if is_file else task)
    return tuple(found)


def _night_path(path: str, base_dir: Path, today: date) -> str:
    return str(output_path(Path(path.replace("{date}", today.isoformat())), base_dir))


def _previous_path(path: str, base_dir: Path) -> str:
    """The folder of a finished evaluation."""
    if path in _NO_FOLDERS:
        return path
    folder = folder_path(Path(path), base_dir)
    if not (folder / "scores.parquet").is_file():
        raise ValueError(
            f"must be the output.path of an earlier evaluation, and {path} holds no scores.parquet"
        )
    return str(folder)


_NO_FOLDERS = ("auto", "none")  # what compare.previous may be beside a folder
_TEXT_KEYS = frozenset("model.path output.path compare.previous eval.include eval.data eval.system".split())
