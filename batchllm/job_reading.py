"""From a YAML file or a mapping to checked sections: what jobs of every kind have in common. Raises JobError."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from batchllm.errors import JobError
from batchllm.job_errors import HIDDEN, complaint, describe, first_error, key_path, unknown_key
from batchllm.job_sections import ColumnRef, Section
from batchllm.job_yaml import Override, apply_overrides, parse_override, parse_yaml

Job = TypeVar("Job", bound=Section)
Blame = Callable[[str], str]  # key path → what to blame for its value
Resolve = Callable[
    [Any, Path], Any
]  # a path as it was given, the folder it starts at → an absolute one, or ValueError


def read_mapping(path: str | Path, needed: str) -> Mapping[Any, Any]:
    """What a job file holds. `needed`: the sections it must have, for a file that is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such job file") from None
    except UnicodeDecodeError:
        raise JobError(f"{path}: a job file is YAML in UTF-8, and this is not UTF-8 text") from None
    except OSError as error:
        raise JobError(f"{path}: the job file cannot be read: {error.strerror}") from None
    mapping = parse_yaml(text, str(path))
    if mapping is None:
        raise JobError(f"{path}: the job file is empty; it needs at least {needed}")
    if not isinstance(mapping, Mapping):
        raise JobError(f"{path}: a job file must be a mapping, found {describe(mapping)}")
    return mapping


def parse_overrides(
    overrides: Sequence[str] | Mapping[str, object], text_keys: frozenset[str]
) -> list[Override]:
    """`a.b=c` texts, or a mapping from `a.b` to a plain value. See `job_yaml.parse_override` for `text_keys`."""
    if isinstance(overrides, Mapping):
        return [(tuple(key.split(".")), value) for key, value in overrides.items()]
    return [parse_override(override, text_keys) for override in overrides]


def blame(source: str, overrides: Sequence[Override]) -> Blame:
    """Key path → what to blame: the job file, or the override that set the key."""

    def where(path: str) -> str:
        for parts, _ in reversed(overrides):
            key = ".".join(parts)
            if path == key or path.startswith((f"{key}.", f"{key}[")) or key.startswith(f"{path}."):
                return f"--set {key}"
        return source

    return where


def checked(kind: type[Job], mapping: Mapping[Any, Any], overrides: Sequence[Override], where: Blame) -> Job:
    """A job of this kind. Its paths are still as they were given."""
    values = apply_overrides(mapping, overrides)
    try:
        return kind.model_validate(values)
    except ValidationError as failure:
        error = first_error(failure.errors(include_url=False))
        raise JobError(f"{where(key_path(error['loc']))}: {_sentence(kind, error)}") from None


def with_absolute_paths(
    job: Job, paths: Sequence[tuple[str, str, Resolve]], base_dir: Path, where: Blame
) -> Job:
    """`paths`: (section, key, how it becomes absolute) of each key that holds one. What is not given stays so."""
    sections: dict[str, Any] = {}
    for section, name, resolve in paths:
        values = sections.get(section, getattr(job, section))
        path = getattr(values, name, None)
        if path is None:
            continue
        try:
            sections[section] = values.model_copy(update={name: resolve(path, base_dir)})
        except ValueError as error:
            key = f"{section}.{name}"
            raise JobError(f"{where(key)}: {key} {error}") from None
    return job.model_copy(update=sections)


def _sentence(kind: type[Section], error: ErrorDetails) -> str:
    path = key_path(error["loc"])
    if error["type"] == "extra_forbidden":
        sections = {name: _keys_at(kind, (name,)) for name in kind.model_fields}
        return unknown_key(error["loc"], _keys_at(kind, error["loc"][:-1]), sections)
    if error["type"] == "missing":
        return f"{path} is missing"
    return f"{path} {complaint(error)}"


def _keys_at(kind: type[Section], location: Sequence[int | str]) -> list[str]:
    """The keys of the mapping at this place in a job."""
    found = kind
    for part in location:
        if part == HIDDEN + "column":
            found = ColumnRef
        elif isinstance(part, str) and not part.startswith(HIDDEN):
            found = _section_in(found.model_fields[part].annotation) or found
    return list(found.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, alone, in a tuple, or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
