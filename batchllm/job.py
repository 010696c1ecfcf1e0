"""The job file: YAML in, one immutable `JobSpec` out, or a `JobError` of one sentence.

    model:    {path, dtype, quantize, trust_remote_code}
    input:    {path, format, id, limit}
    prompt:   {text} | {messages} | {column}, with template_args and unknown_template_args for the chat template,
              and reorder: what of it may stand in any order
    generate: {max_tokens, temperature, ...}          each a value or {column: NAME}
    score:    {continuation, choices, rolling, token_logprobs}     in place of generate
    output:   {path, keep, part_rows, flush_seconds, cache}
    engine:   {device, kv_memory, max_step_tokens, order, workers, min_shared_tokens}
    plan:     {history, sample_rows}
    chunks:   {column, store, reuse, ...}              passages whose KV is reused

A key whose value is null counts as not given. Relative paths start at the job file's own folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, PrivateAttr, ValidationError

from batchllm.errors import JobError
from batchllm.job_errors import HIDDEN, complaint, describe, first_error, key_path, unknown_key
from batchllm.job_paths import history_path, input_path, model_path, output_path
from batchllm.job_sections import (
    ChunksSpec,
    ColumnRef,
    EngineSpec,
    GenerateSpec,
    InputSpec,
    InvalidParam,
    MessageSpec,
    ModelSpec,
    OutputSpec,
    PlanSpec,
    PromptSpec,
    ScoreSpec,
    Section,
)
from batchllm.job_values import parse_bytes
from batchllm.job_yaml import Override, apply_overrides, parse_override, parse_yaml

__all__ = [
    "ChunksSpec",
    "ColumnRef",
    "EngineSpec",
    "GenerateSpec",
    "InputSpec",
    "InvalidParam",
    "JobSpec",
    "MessageSpec",
    "ModelSpec",
    "OutputSpec",
    "PlanSpec",
    "PromptSpec",
    "load_job",
    "make_job",
    "parse_bytes",
]


class JobSpec(Section):
    """One job. Paths are absolute; `source` is what error messages call the job file."""

    model: ModelSpec
    input: InputSpec
    prompt: PromptSpec
    generate: GenerateSpec = GenerateSpec()
    score: ScoreSpec | None = None
    output: OutputSpec
    engine: EngineSpec = EngineSpec()
    plan: PlanSpec = PlanSpec()
    chunks: ChunksSpec | None = None
    _source: str = PrivateAttr("job")

    @property
    def source(self) -> str:
        return self._source

    def resolved(self) -> dict[str, Any]:
        """The whole job as plain YAML-ready values, defaults included; `make_job` gives the same job back."""
        sections: dict[str, dict[str, Any] | None] = self.model_dump(mode="json")
        return {
            name: {key: value for key, value in section.items() if value is not None}
            for name, section in sections.items()
            if section is not None and not (name == "generate" and self.score is not None)
        }


def load_job(path: str | Path, overrides: Sequence[str] | Mapping[str, object] = ()) -> JobSpec:
    """Read and check a job file. `overrides` are `a.b=c` texts, or a mapping from `a.b` to a plain value."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such job file") from None
    except UnicodeDecodeError:
        raise JobError(f"{path}: a job file is YAML in UTF-8, and this is not UTF-8 text") from None
    except OSError as error:
        raise JobError(f"{path}: the job file cannot be read: {error.strerror}") from None
    mapping = parse_yaml(text, str(path))
    if mapping is None:
        raise JobError(f"{path}: the job file is empty; it needs at least model, input, prompt and output")
    if not isinstance(mapping, Mapping):
        raise JobError(f"{path}: a job file must be a mapping, found {describe(mapping)}")
    return _make(mapping, file.absolute().parent, str(path), _parse_overrides(overrides))


def make_job(
    mapping: Mapping[str, Any],
    base_dir: str | Path,
    source: str = "job",
    overrides: Sequence[str] | Mapping[str, object] = (),
) -> JobSpec:
    """A job from plain values. Relative paths start at `base_dir`; errors begin with `source`."""
    return _make(mapping, Path(base_dir).absolute(), source, _parse_overrides(overrides))


def _parse_overrides(overrides: Sequence[str] | Mapping[str, object]) -> list[Override]:
    if isinstance(overrides, Mapping):
        return [(tuple(key.split(".")), value) for key, value in overrides.items()]
    return [parse_override(override, _TEXT_KEYS) for override in overrides]


def _make(mapping: Mapping[Any, Any], base_dir: Path, source: str, overrides: Sequence[Override]) -> JobSpec:
    where = _error_source(source, overrides)
    values = apply_overrides(mapping, overrides)
    try:
        spec = JobSpec.model_validate(values)
    except ValidationError as failure:
        error = first_error(failure.errors(include_url=False))
        raise JobError(f"{where(key_path(error['loc']))}: {_sentence(error['loc'], error)}") from None
    if spec.score is not None and spec.chunks is not None:
        raise JobError(f"{where('chunks')}: score and chunks do not go together; remove one of the sections")
    reuses = spec.chunks is not None and spec.chunks.reuse != "off"
    if reuses and spec.generate.prompt_logprobs is not None:
        raise JobError(
            f"{where('chunks')}: generate.prompt_logprobs and chunks do not go together, because tokens of stored "
            "chunks are not computed; remove one of them, or set chunks.reuse to off"
        )
    spec = _with_absolute_paths(spec, base_dir, where)
    spec._source = source
    return spec


def _with_absolute_paths(spec: JobSpec, base_dir: Path, where: Callable[[str], str]) -> JobSpec:
    sections: dict[str, Any] = {}
    for section, name, resolve in _PATHS:
        values = sections.get(section, getattr(spec, section))
        path = getattr(values, name, None)
        if path is None:
            continue
        try:
            sections[section] = values.model_copy(update={name: resolve(path, base_dir)})
        except ValueError as error:
            key = f"{section}.{name}"
            raise JobError(f"{where(key)}: {key} {error}") from None
    return spec.model_copy(update=sections)


def _error_source(source: str, overrides: Sequence[Override]) -> Callable[[str], str]:
    """Key path → what to blame: the job file, or the override that set the key."""

    def where(path: str) -> str:
        for parts, _ in reversed(overrides):
            key = ".".join(parts)
            if path == key or path.startswith((f"{key}.", f"{key}[")) or key.startswith(f"{path}."):
                return f"--set {key}"
        return source

    return where


def _sentence(location: tuple[int | str, ...], error: Any) -> str:
    path = key_path(location)
    if error["type"] == "extra_forbidden":
        return unknown_key(location, _siblings(location), _SECTIONS)
    if error["type"] == "missing":
        return f"{path} is missing"
    return f"{path} {complaint(error)}"


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """The valid keys beside the one at this location."""
    if len(location) == 1:
        return list(JobSpec.model_fields)
    if HIDDEN + "column" in location:
        return list(ColumnRef.model_fields)
    if len(location) > 2:
        return list(MessageSpec.model_fields)
    return _SECTIONS[str(location[0])]


def _section_class(name: str) -> type[BaseModel]:
    section = JobSpec.model_fields[name].annotation
    if not isinstance(section, type):  # one that may be absent
        section = next(kind for kind in get_args(section) if kind is not type(None))
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    return section


_SECTIONS = {name: list(_section_class(name).model_fields) for name in JobSpec.model_fields}
_PATHS: tuple[tuple[str, str, Callable[[Any, Path], str | Path]], ...] = (
    ("model", "path", model_path),
    ("input", "path", input_path),
    ("output", "path", output_path),
    ("output", "cache", output_path),
    ("plan", "history", history_path),
    ("chunks", "store", output_path),
)
_TEXT_KEYS = frozenset(
    "model.path input.path input.id prompt.text prompt.column output.path output.cache plan.history "
    "chunks.column chunks.store".split()
)
