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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from batchllm.errors import JobError
from batchllm.job_paths import history_path, input_path, model_path, output_path
from batchllm.job_reading import (
    Resolve,
    blame,
    checked,
    parse_overrides,
    read_mapping,
    with_absolute_paths,
)
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
from batchllm.job_yaml import Override

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
    mapping = read_mapping(path, "model, input, prompt and output")
    return _make(mapping, Path(path).absolute().parent, str(path), parse_overrides(overrides, _TEXT_KEYS))


def make_job(
    mapping: Mapping[str, Any],
    base_dir: str | Path,
    source: str = "job",
    overrides: Sequence[str] | Mapping[str, object] = (),
) -> JobSpec:
    """A job from plain values. Relative paths start at `base_dir`; errors begin with `source`."""
    return _make(mapping, Path(base_dir).absolute(), source, parse_overrides(overrides, _TEXT_KEYS))


def _make(mapping: Mapping[Any, Any], base_dir: Path, source: str, overrides: Sequence[Override]) -> JobSpec:
    where = blame(source, overrides)
    spec = checked(JobSpec, mapping, overrides, where)
    if spec.score is not None and spec.chunks is not None:
        raise JobError(f"{where('chunks')}: score and chunks do not go together; remove one of the sections")
    reuses = spec.chunks is not None and spec.chunks.reuse != "off"
    if reuses and spec.generate.prompt_logprobs is not None:
        raise JobError(
            f"{where('chunks')}: generate.prompt_logprobs and chunks do not go together, because tokens of stored "
            "chunks are not computed; remove one of them, or set chunks.reuse to off"
        )
    spec = with_absolute_paths(spec, _PATHS, base_dir, where)
    spec._source = source
    return spec


_PATHS: tuple[tuple[str, str, Resolve], ...] = (
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
