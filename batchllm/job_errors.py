"""From what pydantic finds wrong to one sentence a person can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic_core import ErrorDetails

from batchllm.suggest import nearest

# Tags of unions ("a value, or a column") appear in pydantic's locations but are no key of the job file.
HIDDEN = "~"

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def key_path(parts: Iterable[int | str]) -> str:
    """`prompt.messages[0].content`."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(HIDDEN):
            path += f".{part}" if path else part
    return path


def describe(value: object) -> str:
    """What a value is, in the words of someone who writes YAML."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text `{value if len(value) <= 60 else value[:57] + '...'}`"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence):
        return "a list"
    return f"the {type(value).__name__} {value}"


def first_error(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """The error to report: a misspelt key explains the key that is missing, so it goes first."""
    return min(errors, key=lambda error: error["type"] != "extra_forbidden")


def complaint(error: ErrorDetails) -> str:
    """The error as the end of a sentence whose beginning names the key. Not for unknown and missing keys."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, found {describe(error['input'])}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        bound = context[key]
        limit = f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
        return f"must be {words} {limit}, found {describe(error['input'])}"
    if kind == "literal_error":
        options = str(context["expected"]).replace("'", "")
        return f"must be {options}, found {describe(error['input'])}"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind == "value_error":
        return str(context["error"])
    message = error["msg"]
    return f"is not valid: {message[:1].lower()}{message[1:]}"


def unknown_key(
    parts: Sequence[int | str], siblings: Sequence[str], sections: Mapping[str, Sequence[str]]
) -> str:
    """The sentence for a key that does not exist: `siblings` are the valid ones beside it.

    A key that exists in another section is looked for there before all siblings are listed.
    """
    *parent, name = [part for part in parts if not str(part).startswith(HIDDEN)]
    path, where = key_path(parts), key_path(parent)
    match = nearest(str(name), siblings)
    if match is None:
        elsewhere = {key: section for section, keys in sections.items() for key in keys}
        key = nearest(str(name), elsewhere)
        if key is not None:
            where, match = elsewhere[key], key
    if match is not None:
        return f"{path} is not a known key; did you mean {where}.{match}?".replace(" .", " ")
    owner = where or "a job file"
    return f"{path} is not a known key; the keys of {owner} are {', '.join(siblings)}"
