"""Where this machine keeps what can be found out again at any time."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache_folder() -> Path:
    """The folder for this user's caches of ours, by the platform's custom. It need not exist."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        base = Path(chosen)
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches")
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local"))
    else:
        base = Path("~/.cache")
    try:
        return base.expanduser() / "batchllm"
    except RuntimeError:  # a user without a home
        return Path(os.devnull) / "batchllm"
