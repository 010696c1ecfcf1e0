"""Arguments for the chat template: tools, documents, switches such as `enable_thinking`; of the job or of each row.

A value of `prompt.template_args` may be `{column: NAME}`. `template_args: {column: NAME}` takes all of them from one
column: a mapping, or JSON text that holds one. A null is an argument that is not given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from batchllm.dataset.rows import RowFault
from batchllm.errors import JobError
from batchllm.suggest import column_hint

_FIXED = ("tokenize", "return_tensors", "return_dict", "padding", "truncation", "max_length")


class ChatArgs:
    """`columns` are those it reads; raises JobError for a column that is not there and an argument that is ours."""

    def __init__(self, template_args: Mapping[str, Any], names: Sequence[str], source: str) -> None:
        where = f"{source}: prompt.template_args"
        self._all = _column(template_args)
        self._of_column = {
            key: name for key, value in template_args.items() if (name := _column(value)) and not self._all
        }
        self._of_job = {} if self._all else dict(template_args)
        fixed = next((name for name in _FIXED if name in self._of_job), None)
        if fixed is not None:
            raise JobError(f"{where}.{fixed} cannot be set; remove it")
        self.columns = ({self._all} if self._all else set()) | set(self._of_column.values())
        for key, name in {**({"": self._all} if self._all else {}), **self._of_column}.items():
            if name not in names:
                place = f"{where}.{key}" if key else where
                raise JobError(f"{place}: there is no column `{name}`; {column_hint(name, names)}")

    def of(self, values: Mapping[str, object]) -> dict[str, Any] | RowFault:
        """The arguments for a row, given a value for each of `columns`."""
        args = dict(self._of_job)
        if self._all:
            given = _parsed(values[self._all])
            if not isinstance(given, Mapping | None):
                return RowFault(
                    f"column `{self._all}` must hold a mapping of arguments for the chat template"
                )
            args |= given or {}
            fixed = next((name for name in _FIXED if name in args), None)
            if fixed is not None:
                return RowFault(f"column `{self._all}`: {fixed} cannot be set")
        for key, name in self._of_column.items():
            args[key] = _parsed(values[name])
            if args[key] is None:
                del args[key]
        # A message that the model is to go on with has no end and nothing after it.
        args.setdefault("add_generation_prompt", not args.get("continue_final_message", False))
        return {**args, "tokenize": False}


def _column(value: object) -> str:
    is_reference = (
        isinstance(value, Mapping) and list(value) == ["column"] and isinstance(value["column"], str)
    )
    return str(value["column"]) if is_reference else ""  # type: ignore[index]


def _parsed(value: object) -> Any:
    """Text that is a list or a mapping in JSON stands for it; fields of a struct that are null are not there."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return _without_nulls(value)


def _without_nulls(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
