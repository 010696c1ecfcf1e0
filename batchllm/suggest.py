"""Wording that helps a person mend a name: the nearest valid one, or all of them when none is near."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_NAMES = 12


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, ignoring case, or None when nothing is alike."""
    by_lower = {option.lower(): option for option in options}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def listing(names: Iterable[str]) -> str:
    """`a`, `b` and 3 more."""
    all_names = list(names)
    shown = ", ".join(f"`{name}`" for name in all_names[:_MOST_NAMES])
    more = len(all_names) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def column_hint(name: str, columns: Iterable[str]) -> str:
    """The end of a sentence about a column that is not there."""
    all_columns = list(columns)
    match = nearest(name, all_columns)
    if match is not None:
        return f"did you mean `{match}`?"
    return f"the columns are {listing(all_columns)}" if all_columns else "the input has no columns"
