"""The job file of `batchllm eval`.

model:    as in every job file
engine:   as in every job file
output:   {path}                        a folder for this night; {date} in it is today's date
eval:     {tasks, include, data, limit, num_fewshot, chat_template, system, seed}
compare:  {previous, max_drop, significance}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from batchllm.errors import JobError
from batchllm.job_errors import complaint, describe, first_error, key_path, unknown_key
from batchllm.job_paths import model_path
from batchllm.job_sections import EngineSpec, ModelSpec, Section
from batchllm.job_values import Flag, Limit, PathText, Text
from batchllm.job_yaml import apply_overrides, parse_override, parse_yaml

Share = Annotated[float, Field(ge=0.0, le=1.0)]


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
    num_fewshot: Annotated[int, Field(ge=0, strict=True)] | None = None
    chat_template: Flag = False
    system: Text | None = None
    seed: Annotated[int, Field(ge=0, strict=True)] = 1234

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


def load_eval_job(path: str | Path, overrides: Sequence[str] = (), today: date | None = None) -> EvalJob:
    """Reads and checks a job file. Raises JobError of one sentence."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such job file") from None
    except (OSError, UnicodeDecodeError) as failure:
        raise JobError(f"{path}: the job file cannot be read: {failure}") from None
    mapping = parse_yaml(text, str(path))
    if not isinstance(mapping, Mapping):
        raise JobError(f"{path}: a job file must be a mapping, found {describe(mapping)}")
    values = apply_overrides(mapping, [parse_override(override, _TEXT_KEYS) for override in overrides])
    try:
        job = EvalJob.model_validate(values)
    except ValidationError as failure:
        complaint_of = first_error(failure.errors(include_url=False))
        raise JobError(f"{path}: {_sentence(complaint_of)}") from None
    return _with_absolute_paths(job, file.absolute().parent, str(path), today or date.today())


def _sentence(error: Any) -> str:
    location = error["loc"]
    if error["type"] == "extra_forbidden":
        siblings = list(EvalJob.model_fields) if len(location) == 1 else _SECTIONS.get(str(location[0]), [])
        return unknown_key(location, siblings, _SECTIONS)
    if error["type"] == "missing":
        return f"{key_path(location)} is missing"
    return f"{key_path(location)} {complaint(error)}"


def _with_absolute_paths(job: EvalJob, base: Path, source: str, today: date) -> EvalJob:
    try:
        model = job.model.model_copy(update={"path": model_path(job.model.path, base)})
    except ValueError as error:
        raise JobError(f"{source}: model.path {error}") from None
    output = str((base / job.output.path.replace("{date}", today.isoformat())).resolve())
    previous = job.compare.previous
    if previous not in ("auto", "none"):
        previous = str((base / previous).resolve())
        if not (Path(previous) / "scores.parquet").exists():
            raise JobError(f"{source}: compare.previous: {job.compare.previous} holds no scores.parquet")
    folders = {}
    for name in ("include", "data"):
        folder = getattr(job.eval, name)
        if folder is not None:
            folders[name] = (base / folder).resolve()
            if not folders[name].is_dir():
                raise JobError(f"{source}: eval.{name}: there is no folder {folder}")
    tasks = tuple(_with_absolute_file(task, base) for task in job.eval.tasks)
    return job.model_copy(
        update={
            "model": model,
            "output": EvalOutput(path=output),
            "compare": job.compare.model_copy(update={"previous": previous}),
            "eval": job.eval.model_copy(update={"data": base, "tasks": tasks, **folders}),
        }
    )


def _with_absolute_file(task: TaskSpec, base: Path) -> TaskSpec:
    """A task that is a YAML file beside the job file."""
    file = base / task.task
    is_file = file.suffix in (".yaml", ".yml") and file.is_file()
    return task.model_copy(update={"task": str(file.resolve())}) if is_file else task


_SECTIONS = {
    "model": list(ModelSpec.model_fields),
    "engine": list(EngineSpec.model_fields),
    "eval": list(EvalSpec.model_fields),
    "output": list(EvalOutput.model_fields),
    "compare": list(CompareSpec.model_fields),
}
_TEXT_KEYS = frozenset("model.path output.path compare.previous eval.include eval.data eval.system".split())
