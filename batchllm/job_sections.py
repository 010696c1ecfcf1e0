"""The sections of a job file and what each key may hold. `job` reads the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from batchllm.core import SamplingParams
from batchllm.job_errors import HIDDEN, complaint, first_error, key_path
from batchllm.job_params import contradiction
from batchllm.job_values import (
    Bytes,
    Count,
    CountOrAuto,
    CountOrNone,
    Factor,
    Flag,
    JsonSchema,
    KeptColumns,
    Limit,
    LogitBias,
    MinP,
    OneWorker,
    PartRows,
    PathText,
    Pattern,
    Penalty,
    PromptTop,
    Reorder,
    ReuseMode,
    Seconds,
    Seed,
    Share,
    StopStrings,
    StopTokens,
    Temperature,
    Text,
    Texts,
    TopLogprobs,
    TopP,
)


class Section(BaseModel):
    """A mapping with known keys only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        named = {str(key): value for key, value in data.items()}
        return {
            key: value for key, value in named.items() if value is not None or key not in cls.model_fields
        }


class ColumnRef(Section):
    """`{column: NAME}`: the value of each row is in that column."""

    column: Annotated[str, Field(strict=True, min_length=1)]


def _value_or_column(value: object) -> str:
    return HIDDEN + ("column" if isinstance(value, Mapping | ColumnRef) else "value")


def _mapping_or_column(value: object) -> str:
    return HIDDEN + ("column" if _is_column(value) else "value")


def _is_column(value: object) -> bool:
    return isinstance(value, ColumnRef) or (isinstance(value, Mapping) and list(value) == ["column"])


T = TypeVar("T")

OrColumn = Annotated[
    Annotated[T, Tag(HIDDEN + "value")] | Annotated[ColumnRef, Tag(HIDDEN + "column")],
    Discriminator(_value_or_column),
]
MappingOrColumn = Annotated[
    Annotated[T, Tag(HIDDEN + "value")] | Annotated[ColumnRef, Tag(HIDDEN + "column")],
    Discriminator(_mapping_or_column),
]
_MAPPINGS = frozenset({"logit_bias", "json_schema"})


class ModelSpec(Section):
    path: PathText  # a folder (absolute), or the id of a model on the hub
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["int8_weight_only", "int8_dynamic"] | None = None  # of the linear layers, after loading
    trust_remote_code: Flag = False


class InputSpec(Section):
    path: PathText  # an absolute file, folder or glob, or a URL
    format: Literal["auto", "parquet", "jsonl", "csv"] = "auto"
    id: Text | None = None
    limit: Limit | None = None


class MessageSpec(Section):
    role: Text
    content: Annotated[str, Field(strict=True)]


class PromptSpec(Section):
    """Exactly one of `text`, `messages` and `column` is set."""

    text: Text | None = None
    messages: Annotated[tuple[MessageSpec, ...], Field(min_length=1)] | None = None
    column: Text | None = None
    template_args: dict[str, Any] = {}
    unknown_template_args: Literal["error", "ignore"] = "error"  # those that the chat template does not use
    reorder: Reorder | None = None  # a list column, or columns: what may stand in any order

    @model_validator(mode="after")
    def _exactly_one(self) -> PromptSpec:
        given = [name for name in ("text", "messages", "column") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"must have exactly one of text, messages and column, found {found}")
        if self.reorder is not None and self.column is not None:
            raise ValueError("has reorder, which needs a template: give text or messages instead of column")
        if self.template_args and self.text is not None:
            raise ValueError("has template_args, which are for messages or column and do nothing for text")
        return self


class GenerateSpec(Section):
    """How answers are sampled. `columns` and `params` are how a row set gets its SamplingParams."""

    max_tokens: OrColumn[Count] = 256
    temperature: OrColumn[Temperature] = 0.0
    top_p: OrColumn[TopP] = 1.0
    top_k: OrColumn[CountOrNone] = 0
    min_p: OrColumn[MinP] = 0.0
    n: OrColumn[Count] = 1
    seed: OrColumn[Seed] = 0
    stop: OrColumn[StopStrings] = ()
    stop_token_ids: OrColumn[StopTokens] = ()
    ignore_eos: OrColumn[Flag] = False
    logprobs: OrColumn[Flag] = False
    top_logprobs: OrColumn[TopLogprobs] = 0
    prompt_logprobs: OrColumn[PromptTop] = None
    best_of: OrColumn[CountOrNone] = 0
    repetition_penalty: OrColumn[Factor] = 1.0
    frequency_penalty: OrColumn[Penalty] = 0.0
    presence_penalty: OrColumn[Penalty] = 0.0
    logit_bias: MappingOrColumn[LogitBias] = ()
    bad_words: OrColumn[Texts] = ()
    allowed_token_ids: OrColumn[StopTokens] = ()
    min_tokens: OrColumn[CountOrNone] = 0
    include_stop: OrColumn[Flag] = False
    skip_special_tokens: OrColumn[Flag] = True
    choice: OrColumn[Texts] = ()
    regex: OrColumn[Pattern] = ""
    json_schema: MappingOrColumn[JsonSchema] = ""
    grammar: OrColumn[Pattern] = ""

    @model_validator(mode="after")
    def _consistent(self) -> GenerateSpec:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        own = {name: value for name, value in values.items() if not isinstance(value, ColumnRef)}
        found = contradiction(SamplingParams(**own)) if len(own) == len(values) else None
        if found is not None:
            raise ValueError(" ".join(("has", *found)))
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Parameter → the column its values are in."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value.column for name, value in values.items() if isinstance(value, ColumnRef)}

    def params(self, row_values: Mapping[str, object], check: bool = True) -> SamplingParams:
        """The parameters of a row, given a value for every parameter in `columns`. Raises InvalidParam.

        Without `check` values may contradict each other.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields} | dict(row_values)
        return SamplingParams(**(valid_params(values) if check else values))


class ScoreSpec(Section):
    """What of each row is scored instead of answered."""

    continuation: Text | None = (
        None  # a template: the text that follows the prompt; {{ choice }} if not given
    )
    choices: Text | None = None  # a list column: each of its texts is scored, as `choice` in the template
    rolling: Flag = (
        False  # the prompt itself is scored, from its first token on, in windows of the model's length
    )
    token_logprobs: Flag = False

    @model_validator(mode="after")
    def _one_kind(self) -> ScoreSpec:
        given = self.continuation is not None or self.choices is not None
        if self.rolling == given:
            found = "both" if given else "neither"
            raise ValueError(f"must have rolling: true, or continuation or choices, found {found}")
        return self

    @property
    def template(self) -> str:
        """Of the continuation."""
        return self.continuation or "{{ choice }}"


class InvalidParam(ValueError):
    """One sampling parameter is out of range: `parameter` names it, `reason` ends the sentence "it ..."."""

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(f"{parameter} {reason}")
        self.parameter, self.reason = parameter, reason


class OutputSpec(Section):
    path: Path  # absolute
    keep: KeptColumns = ()
    part_rows: PartRows = 10_000
    flush_seconds: Seconds = 10.0
    cache: Path | None = None  # absolute: a folder of answers that jobs share

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where answers are written."""
        return (self.path,) if self.cache is None else (self.path, self.cache)


class EngineSpec(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kv_memory: Bytes = "auto"
    max_step_tokens: CountOrAuto = "auto"
    order: Literal["auto", "decode_ratio", "dual_scan", "longest_first", "tree", "input"] = "auto"
    workers: OneWorker = 1
    min_shared_tokens: CountOrAuto = "auto"


class PlanSpec(Section):
    """What the planner may learn output lengths from."""

    history: Path | None = None  # absolute: the output folder of an earlier run
    sample_rows: Count | None = None  # so many rows, chosen at random, are run before the rest is planned


class ChunksSpec(Section):
    """Passages whose KV is kept in a store (`batchllm precompute`) and reused wherever they stand in a prompt."""

    column: Text  # a list column; the template shows its elements
    store: Path  # absolute
    reuse: ReuseMode = "exact"
    rule: Literal["most_sensitive", "cache_craft", "first_tokens", "largest_deviation"] = "most_sensitive"
    recompute: Share | None = (
        None  # of the reused tokens, with repair; 0.15 where neither this nor a target is given
    )
    target_quality: Share | None = None  # share of a sample that must be answered as without reuse
    sample: Share = (
        0.02  # of the answers, at least 50: answered both ways, to measure the quality of lossy reuse
    )
    contexts: Count = 4  # that each chunk is computed in, to know what of it depends on them
    variants: Count = 2  # of them, stored with their KV
    codec: Literal["raw", "bf16", "fp8", "int8", "int4"] = "raw"
    store_limit: Bytes | None = None
    host_memory: Bytes = "auto"  # for KV on its way from the store into KV memory

    @model_validator(mode="after")
    def _one_knob(self) -> ChunksSpec:
        given = [name for name in ("recompute", "target_quality") if getattr(self, name) is not None]
        if len(given) == 2:
            raise ValueError("has recompute and target_quality: give one, the other follows from it")
        if given and self.reuse != "repair":
            raise ValueError(f"has {given[0]}, which is for reuse: repair; found reuse: {self.reuse}")
        return self

    @property
    def lossy(self) -> bool:
        """Whether answers may differ from those of a full computation."""
        return self.reuse in ("naive", "repair")


def valid_params(values: Mapping[str, object]) -> dict[str, Any]:
    for name, value in values.items():
        if _is_column(value) or (isinstance(value, Mapping) and name not in _MAPPINGS):
            raise InvalidParam(name, "must be a value, found a mapping")
    try:
        spec = GenerateSpec.model_validate(dict(values))
    except ValidationError as failure:
        error = first_error(failure.errors(include_url=False))
        if not error["loc"]:  # of values that do not go together
            raise InvalidParam(*complaint(error).removeprefix("has ").split(" ", 1)) from None
        raise InvalidParam(key_path(error["loc"]), complaint(error)) from None
    return {name: getattr(spec, name) for name in values}
