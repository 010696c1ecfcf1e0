"""Sizes as people read them."""

from __future__ import annotations


def size_text(count: float) -> str:
    """`812 bytes`, `3.4 GiB`."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
