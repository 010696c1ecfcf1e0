"""Tasks of lm-evaluation-harness by name or from YAML files, with their data from local files."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from batchllm.evals.eval_job import EvalSpec, TaskSpec
from batchllm.suggest import nearest

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class LoadedTasks:
    """The tasks that can run, and one sentence for each that cannot."""

    tasks: dict[str, Any] = field(default_factory=dict)  # by name
    errors: dict[str, str] = field(default_factory=dict)  # by the name that the job gives


def load_tasks(spec: EvalSpec) -> LoadedTasks:
    """Relative paths of data files start at `eval.data`. A task that cannot be loaded does not stop the others."""
    assert spec.data is not None, "paths of an EvalJob are absolute"
    found = LoadedTasks()
    index = _Index(spec.include)
    with contextlib.chdir(spec.data), quiet():
        for number, task in enumerate(spec.tasks):
            where = f"eval.tasks[{number}]"
            try:
                loaded = index.load(task)
            except UnknownTask as error:
                found.errors[task.task] = f"{where}: {error}"
            except Exception as error:  # data sets, templates and filters of a task raise what they like
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                found.errors[task.task] = (
                    f"{where}: task `{task.task}` cannot be loaded: {reason}; "
                    f"if its data is not here, name local files in {where}.data"
                )
            else:
                found.tasks.update(loaded)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and progress bars of the harness and of datasets."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class UnknownTask(Exception):
    """No task has this name."""


class _Index:
    """Names of tasks: those of the job's own folder first; the harness's thousands only if they are needed."""

    def __init__(self, include: Path | None):
        self._own = TaskManager(include_path=str(include) if include else None, include_defaults=False)
        self._include = include
        self._all: TaskManager | None = None

    def load(self, spec: TaskSpec) -> dict[str, Any]:
        manager, name = self._find(spec.task)
        if spec.data is None:
            loaded = manager.load([name])
        else:
            path = manager.task_index[name].yaml_path if name in manager.task_index else Path(name)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "task.yaml"
                values = {"include": str(path.resolve()), "task": Path(name).stem, **_local_data(spec)}
                file.write_text(yaml.safe_dump(values), encoding="utf-8")
                loaded = manager.load([str(file)])
        if any(isinstance(group, Group) for group in loaded["groups"].values()) and not loaded["tasks"]:
            raise UnknownTask(f"`{spec.task}` is a group without tasks")
        return dict(loaded["tasks"])

    def _find(self, name: str) -> tuple[TaskManager, str]:
        if name in self._own.task_index:
            return self._own, name
        if Path(name).suffix in (".yaml", ".yml"):
            for folder in (Path(), self._include or Path()):
                if (folder / name).is_file():
                    return self._own, str(folder / name)
            raise UnknownTask(f"there is no task file {name}")
        if name not in self.all_names():
            match = nearest(name, self.all_names())
            hint = (
                f"; did you mean {match}?" if match else "; give its YAML file, or its folder as eval.include"
            )
            raise UnknownTask(f"there is no task `{name}`{hint}")
        assert self._all is not None
        return self._all, name

    def all_names(self) -> list[str]:
        if self._all is None:
            self._all = TaskManager(include_path=str(self._include) if self._include else None)
        return list(self._all.all_tasks)


def _local_data(spec: TaskSpec) -> dict[str, Any]:
    """What replaces a task's own data in its configuration."""
    assert spec.data is not None
    missing = next((path for path in spec.data.values() if not Path(path).is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"there is no data file {missing}")
    kinds = {_FORMATS.get(Path(path).suffix, "") for path in spec.data.values()}
    if len(kinds) != 1 or not (kind := kinds.pop()):
        raise ValueError("data files must all be JSON, JSON lines, CSV or Parquet")
    options: dict[str, Any] = {"data_files": dict(spec.data)}
    if spec.field is not None:
        options["field"] = spec.field
    return {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": options}
