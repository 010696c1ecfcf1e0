"""The documentation names what there is: every key of a job file, every module, and no others."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest

from batchllm.evals.eval_job import EvalJob
from batchllm.job import JobSpec
from batchllm.job_sections import Section

PROJECT = Path(__file__).parent.parent
DOCS = PROJECT / "docs"
README = PROJECT / "README.md"


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, alone or beside None."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def keys_of(job: type[Section]) -> dict[str, Any]:
    """section.key → its field."""
    sections = {name: section_of(field.annotation) for name, field in job.model_fields.items()}
    return {
        f"{name}.{key}": field
        for name, section in sections.items()
        if section is not None
        for key, field in section.model_fields.items()
    }


def rows_of(page: Path) -> dict[str, str]:
    """Key → default, of the tables in a page."""
    found = re.findall(r"^\| ((?:`[a-z_.*]+`(?:, )?)+) \| ([^|]*) \|", page.read_text(), re.MULTILINE)
    return {key: default for keys, default in found for key in re.findall(r"`([a-z_.]+)`", keys)}


def test_every_key_of_a_job_is_described_once_and_no_other() -> None:
    assert sorted(rows_of(DOCS / "job.md")) == sorted(keys_of(JobSpec))


def test_stated_defaults_are_the_defaults() -> None:
    stated = {key: default.strip("`") for key, default in rows_of(DOCS / "job.md").items()}
    for key, field in keys_of(JobSpec).items():
        if field.is_required():
            assert stated[key] == "required", key
        elif isinstance(field.default, bool):
            assert stated[key] == str(field.default).lower(), key
        elif isinstance(field.default, int | float):
            assert key == "generate.best_of" or float(stated[key]) == field.default, key
        elif isinstance(field.default, str) and field.default:
            assert stated[key] == field.default, key


def test_the_readme_names_keys_that_exist() -> None:
    named = rows_of(README)
    assert len(named) > 10
    assert named.keys() <= keys_of(JobSpec).keys()


def test_every_key_of_an_eval_job_is_described() -> None:
    own = {key for key in keys_of(EvalJob) if not key.startswith(("model.", "engine."))}
    assert own == {
        key for key in rows_of(DOCS / "evals.md") if key.startswith(("eval.", "output.", "compare."))
    }


MODULES = sorted(
    str(path.relative_to(PROJECT / "batchllm").with_suffix(""))
    for path in (PROJECT / "batchllm").rglob("*.py")
    if not path.name.startswith("__")
)


def mapped() -> list[str]:
    """The modules that the map of docs/architecture.md names, as patterns."""
    first_columns = re.findall(r"^\| (`[^|]+`) \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    names = []
    for group in re.findall(r"`([^`]+)`", "".join(first_columns)):
        folder, slash, listed = group.rpartition("/")
        names += [folder + slash + name for name in listed.split(", ")]
    return [name.removesuffix(".py") for name in names]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_on_the_map(module: str) -> None:
    assert any(fnmatch(module, pattern) for pattern in mapped()), (
        f"docs/architecture.md does not name {module}"
    )
