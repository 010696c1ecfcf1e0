"""Garbage collection that waits until a command has started.

Importing torch and transformers makes a million objects that stay to the end. To look through them again and again
while they are made takes a second, a sixth of the time to the first step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_is_held = False


def hold_collection() -> None:
    """From here on nothing is collected. For a process of our own: memory that only a cycle holds is not freed."""
    global _is_held
    _is_held = _is_held or gc.isenabled()
    gc.disable()


def resume_collection() -> None:
    """Ends `hold_collection`, if it was called. What exists now is taken to stay, and never looked at again."""
    global _is_held
    if _is_held:
        _is_held = False
        gc.freeze()
        gc.enable()


@contextmanager
def no_collection() -> Iterator[None]:
    """Nothing is collected inside, everything afterwards: for a process that is not ours alone."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
