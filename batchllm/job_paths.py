"""Paths of a job file: relative to its folder, absolute afterwards. A ValueError is the end of a sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path

_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def input_path(path: str, base_dir: Path) -> str:
    """Files, folders and globs become absolute; URLs stay as they are. Nothing is looked up yet."""
    return path if is_url(path) else absolute_path(path, base_dir)


def output_path(path: Path, base_dir: Path) -> Path:
    """An absolute local path that is no file."""
    # Path() has turned the `//` of a URL into one `/`.
    if re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+:/", str(path)):
        raise ValueError("must be a local folder; copy the results to a URL when the job is done")
    absolute = Path(absolute_path(str(path), base_dir))
    if absolute.exists() and not absolute.is_dir():
        raise ValueError(f"must be a folder, and `{absolute}` is a file")
    return absolute


def history_path(path: Path, base_dir: Path) -> Path:
    """An existing local folder."""
    absolute = Path(absolute_path(str(path), base_dir))
    if not absolute.is_dir():
        raise ValueError(f"must be the output folder of an earlier run, and there is no folder `{absolute}`")
    return absolute


def folder_path(path: Path, base_dir: Path) -> Path:
    """An existing local folder."""
    absolute = Path(absolute_path(str(path), base_dir))
    if not absolute.is_dir():
        raise ValueError(f"must be a folder, and there is no folder `{absolute}`")
    return absolute


def model_path(path: str, base_dir: Path) -> str:
    """An existing folder becomes absolute; what can be `model` or `owner/model` on the hub stays as it is."""
    absolute = absolute_path(path, base_dir)
    if os.path.isdir(absolute):
        return absolute
    if os.path.exists(absolute):
        raise ValueError(f"must be a model folder, and `{absolute}` is a file; give the folder it is in")
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
    if not is_hub_id:
        raise ValueError(f"names no folder: `{absolute}` does not exist")
    return path


def absolute_path(path: str, base_dir: Path) -> str:
    """`~` is the user's home."""
    return os.path.normpath(os.path.join(base_dir, os.path.expanduser(path)))
