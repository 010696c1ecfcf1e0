"""The kinds of value a job file holds: what is accepted, and the end of the sentence when it is not."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from batchllm.job_errors import describe

_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1
_MAX_FLOAT = sys.float_info.max
_MOST_LOGPROBS = 100  # beside each token
MAX_PART_ROWS = 1_000_000  # the keys of a part's rows lie in its footer, which every reader loads whole
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse_bytes(value: int | str) -> int:
    """4GiB → 4294967296. GB is 10^9; GiB and G are 2^30. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", str(value).lower())
    if isinstance(value, bool) or match is None or match[2] not in _UNITS:
        raise ValueError(f"must be a size such as 4GiB or a number of bytes, found {describe(value)}")
    size = int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]
    if size < 1:
        raise ValueError("must be at least 1 byte")
    return size


def _path_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _bytes_or_auto(value: object) -> object:
    if value == "auto":
        return value
    if not isinstance(value, int | str):
        raise ValueError(f"must be a size such as 4GiB, or auto, found {describe(value)}")
    return parse_bytes(value)


def _count_or_auto(value: object) -> object:
    if value == "auto":
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"must be a whole number or auto, found {describe(value)}")
    if value < 1:
        raise ValueError(f"must be at least 1, found {describe(value)}")
    return value


def _only_one_worker(value: object) -> object:
    if value != 1 or isinstance(value, bool):
        raise ValueError(f"must be 1, because this version runs one worker, found {describe(value)}")
    return value


def _stop_strings(value: object) -> object:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) for string in strings):
        raise ValueError(f"must be text or a list of texts, found {describe(value)}")
    if "" in strings:
        raise ValueError("must not contain an empty text")
    return tuple(strings)


def _texts(value: object) -> object:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"must be a list of texts, found {describe(value)}")
    if "" in value:
        raise ValueError("must not contain an empty text")
    return tuple(value)


def _logit_bias(value: object) -> object:
    """A mapping from token id to number, or pairs of these; in JSON keys are text."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError(f"must be a mapping from token id to a number, found {describe(value)}")
    found: dict[int, float] = {}
    for token, bias in pairs:
        is_id = isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= _MAX_INT32
        if isinstance(token, str) and token.isdecimal() and len(token) <= len(str(_MAX_INT32)):
            token = int(token)
            is_id = token <= _MAX_INT32
        if not is_id:
            raise ValueError(f"must have token ids as keys, found {describe(token)}")
        if not isinstance(bias, int | float) or isinstance(bias, bool) or not abs(bias) <= _MAX_FLOAT:
            raise ValueError(f"must have a number for token {token}, found {describe(bias)}")
        found[token] = float(bias)
    return tuple(sorted(found.items()))


def _json_schema(value: object) -> object:
    """A schema as a mapping, true or false, or as JSON text → JSON text."""
    if value == "":
        return value
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be a JSON schema, found text that is not JSON: {error}") from None
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"must be a JSON schema, which is a mapping, found {describe(schema)}")
    try:
        text = json.dumps(schema, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be a JSON schema, found text that is half a surrogate pair") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"must be a JSON schema: {error}") from None
    return text


def _prompt_logprobs(value: object) -> object:
    """true: of the prompt's tokens alone; a number: and of so many most probable tokens beside each."""
    if value is None or isinstance(value, bool):
        return 0 if value else None
    if not isinstance(value, int) or not 0 <= value <= _MOST_LOGPROBS:
        raise ValueError(
            f"must be true, false or a whole number from 0 to {_MOST_LOGPROBS}, found {describe(value)}"
        )
    return value


def _kept_columns(value: object) -> object:
    if value == "all":
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"must be a list of columns, or all, found {describe(value)}")
    return tuple(dict.fromkeys(value))


def _reorder(value: object) -> object:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value):
        if len(value) < 2:
            raise ValueError(
                "must name one list column, as in passages, or several columns, as in [title, text]"
            )
        twice = next((name for number, name in enumerate(value) if name in value[:number]), None)
        if twice is not None:
            raise ValueError(f"names the column `{twice}` twice")
        return tuple(value)
    raise ValueError(f"must be the name of a list column or a list of columns, found {describe(value)}")


def _off_is_text(value: object) -> object:
    return "off" if value is False else value  # YAML reads `off` as false


ReuseMode = Annotated[Literal["off", "exact", "naive", "repair"], BeforeValidator(_off_is_text)]
Text = Annotated[str, Field(strict=True, min_length=1)]
PathText = Annotated[str, BeforeValidator(_path_text), Field(strict=True, min_length=1)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=_MAX_INT32)]
PartRows = Annotated[int, Field(strict=True, ge=1, le=MAX_PART_ROWS)]
CountOrNone = Annotated[int, Field(strict=True, ge=0, le=_MAX_INT32)]
Temperature = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
TopP = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
MinP = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(strict=True, ge=0, le=_MAX_INT64)]
StopStrings = Annotated[tuple[str, ...], BeforeValidator(_stop_strings)]
StopTokens = tuple[CountOrNone, ...]
TopLogprobs = Annotated[int, Field(strict=True, ge=0, le=_MOST_LOGPROBS)]
PromptTop = Annotated[int | None, BeforeValidator(_prompt_logprobs)]
Factor = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(strict=True, allow_inf_nan=False)]
LogitBias = Annotated[tuple[tuple[int, float], ...], BeforeValidator(_logit_bias)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Pattern = Annotated[str, Field(strict=True)]
JsonSchema = Annotated[str, BeforeValidator(_json_schema)]
KeptColumns = Annotated[tuple[str, ...] | Literal["all"], BeforeValidator(_kept_columns)]
Reorder = Annotated[str | tuple[str, ...], BeforeValidator(_reorder)]
Bytes = Annotated[int | Literal["auto"], BeforeValidator(_bytes_or_auto)]
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
OneWorker = Annotated[int, BeforeValidator(_only_one_worker)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Limit = Annotated[int, Field(strict=True, ge=0)]
