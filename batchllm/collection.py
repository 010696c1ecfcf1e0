"""Garbage collection that waits until a command has started.

Importing torch and transformers makes a million objects that stay to the end. To look through them again and again
while they are made takes a second, a sixth of the time to the first step.
"""

from __future__ import annotations

import gc

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
