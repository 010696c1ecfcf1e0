"""Arguments for the chat template: tools, documents, switches such as `enable_thinking`; of the job or of each row.

A value of `prompt.template_args` may be `{column: NAME}`. `template_args: {column: NAME}` takes all of them from one
column: a mapping, or JSON text that holds one. A null is an argument that is not given. In a column of text, as every
switch of a CSV file is, `true` and `false` are switches: as texts, both would count as true.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

from batchllm.dataset.messages import without_nulls
from batchllm.dataset.rows import RowFault
from batchllm.errors import JobError
from batchllm.job_errors import describe
from batchllm.suggest import column_hint

_FIXED = (
    "conversation messages tokenize return_tensors return_dict return_assistant_tokens_mask padding truncation "
    "max_length tokenizer_kwargs sanitize_control_tokens"
).split()
_LISTS = ("tools", "documents")
_SWITCHES = {"true": True, "false": False, "True": True, "False": False}


class ChatArgs:
    """`columns` are those it reads; raises JobError for a column that is not there and an argument that is ours."""

    def __init__(self, template_args: Mapping[str, Any], names: Sequence[str], source: str) -> None:
        where = f"{source}: prompt.template_args"
        self._all = _column(template_args)
        self._of_column = {
            key: name for key, value in template_args.items() if (name := _column(value)) and not self._all
        }
        self._of_job = {} if self._all else dict(template_args)
        self._same = {
            name: _parsed(value) if name in _LISTS and isinstance(value, str) else value
            for name, value in self._of_job.items()
            if name not in self._of_column
        }
        wrong = wrong_args(self._of_job | self._same, set(self._of_column))
        if wrong is not None:
            raise JobError(f"{where}: {wrong}")
        self.columns = ({self._all} if self._all else set()) | set(self._of_column.values())
        for key, name in {**({"": self._all} if self._all else {}), **self._of_column}.items():
            if name not in names:
                place = f"{where}.{key}" if key else where
                raise JobError(f"{place}: there is no column `{name}`; {column_hint(name, names)}")

    def of(self, values: Mapping[str, object]) -> dict[str, Any] | RowFault:
        """The arguments for a row, given a value for each of `columns`."""
        args = dict(self._same)
        if self._all:
            given = _parsed(values[self._all])
            if not isinstance(given, Mapping | None):
                return RowFault(
                    f"column `{self._all}` must hold a mapping of arguments for the chat template, or JSON of one"
                )
            args |= {name: value for name, value in (given or {}).items() if value is not None}
            wrong = wrong_args(args)
            if wrong is not None:
                return RowFault(f"column `{self._all}`: {wrong}")
        for key, name in self._of_column.items():
            value = _parsed(values[name])
            if value is None:
                continue
            if isinstance(value, str):
                value = _SWITCHES.get(value, value)
            args[key] = value
            wrong = wrong_args(args)
            if wrong is not None:
                return RowFault(f"column `{name}`: {wrong}")
        return with_defaults(args)

    def names_of_job(self) -> list[str]:
        """The arguments that the job names, those with a column of their own among them."""
        return [name for name, value in self._of_job.items() if value is not None]

    @property
    def column_of_all(self) -> str:
        """The column whose values are the arguments of a row, or nothing."""
        return self._all


def with_defaults(args: Mapping[str, Any]) -> dict[str, Any]:
    """A message that the model is to go on with has no end and nothing after it; otherwise its answer begins."""
    return {"add_generation_prompt": not args.get("continue_final_message", False), **args}


def wrong_args(args: Mapping[str, Any], later: Set[str] = frozenset()) -> str | None:
    """A sentence about the first argument that no chat template can take, or None; of `later` the names alone count."""
    fixed = next((name for name in _FIXED if name in args), None)
    if fixed is not None:
        return f"{fixed} cannot be set; remove it"
    args = {name: value for name, value in args.items() if name not in later}
    for name in _LISTS:
        value = args.get(name)
        if value is None:
            continue
        if not isinstance(value, list):
            return f"{name} must be a list of mappings, or JSON of one, found {describe(value)}"
        other = next((item for item in value if not isinstance(item, Mapping)), None)
        if other is not None:
            return f"{name} must be a list of mappings, found one that holds {describe(other)}"
    if not isinstance(args.get("chat_template"), str | None):
        return f"chat_template must be text, found {describe(args['chat_template'])}"
    going_on, begins = args.get("continue_final_message"), args.get("add_generation_prompt")
    if not isinstance(begins, bool | None):
        return f"add_generation_prompt must be true or false, found {describe(begins)}"
    if not isinstance(going_on, bool | str | None):
        return (
            f"continue_final_message must be true, false or the name of a field, found {describe(going_on)}"
        )
    if going_on and begins:
        return (
            "continue_final_message goes on with a message and add_generation_prompt begins one; remove one"
        )
    return None


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
    return without_nulls(value)
