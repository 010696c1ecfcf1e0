"""Which files an input path means: a file, a folder, a glob, or any of these behind a URL."""

from __future__ import annotations

import fnmatch
import os
import posixpath
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from batchllm.errors import InputError, first_line
from batchllm.job_paths import is_url
from batchllm.suggest import nearest

EXTENSIONS = {"parquet": (".parquet", ".pq"), "jsonl": (".jsonl", ".ndjson"), "csv": (".csv",)}
_COMPRESSED = re.compile(r"\.(gz|bz2|zst|lz4|br)$")


@dataclass(frozen=True)
class InputFiles:
    """Files of one format, sorted by path. `key=value` folders below `base` are columns."""

    filesystem: fs.FileSystem
    paths: tuple[str, ...]
    format: str
    base: str | None


def find_files(path: str, format: str, without: Collection[Path] = ()) -> InputFiles:
    """The files that `input.path` and `input.format` name, at least one. Raises InputError.

    Parquet files in the folders `without`, which hold a run's own answers, are found only where `path` is such a file.
    """
    try:
        filesystem, root = _filesystem(path)
        info = filesystem.get_file_info(root)
        if info.type == fs.FileType.File:
            return InputFiles(filesystem, (root,), _format_of([root], format, path)[0], None)
        if info.type == fs.FileType.Directory:
            base, found = root, _files_below(filesystem, root)
        else:
            base, pattern = _split_glob(root)
            if not pattern:
                raise InputError(f"input.path: `{path}` does not exist{_near(filesystem, root)}")
            found = _glob(filesystem, base, pattern)
        paths = sorted(set(found))
        if isinstance(filesystem, fs.LocalFileSystem):
            paths = _not_in(without, paths)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"input.path: `{path}` cannot be opened: {first_line(error)}") from None
    if not paths:
        what = "no file matches" if info.type == fs.FileType.NotFound else "there is no file in"
        raise InputError(
            f"input.path: {what} `{path}` (names that begin with _ or . are left out, and so are the job's own answers)"
        )
    name, chosen = _format_of(paths, format, path)
    return InputFiles(filesystem, tuple(chosen), name, base)


def _filesystem(path: str) -> tuple[fs.FileSystem, str]:
    if not is_url(path):
        return fs.LocalFileSystem(), path
    try:
        filesystem, root = fs.FileSystem.from_uri(path)
    except (pa.ArrowException, ValueError, ImportError) as error:
        raise InputError(
            f"input.path: `{path}` cannot be opened ({first_line(error)}); "
            f"URLs may begin with file://, s3://, gs:// or hdfs://"
        ) from None
    return filesystem, root.rstrip("/") or "/"


def _split_glob(root: str) -> tuple[str, list[str]]:
    """`/a/b*/c` → `/a`, [`b*`, `c`]. The pattern is empty when nothing in the path is a wildcard."""
    parts = root.split("/")
    fixed = next((number for number, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return "/".join(parts[:fixed]) or "/", parts[fixed:]


def _glob(filesystem: fs.FileSystem, folder: str, pattern: list[str]) -> Iterator[str]:
    """Files that match. `**` stands for any number of folders; a folder that matches stands for its files."""
    part, *rest = pattern
    if part == "**" and rest:
        yield from _glob(filesystem, folder, rest)
    for info in _children(filesystem, folder):
        is_folder = info.type == fs.FileType.Directory
        if part == "**" and not _hidden(info.base_name):
            if is_folder:
                yield from _glob(filesystem, info.path, pattern)
            elif not rest:
                yield info.path
        elif part != "**" and _name_matches(info.base_name, part):
            if rest and is_folder:
                yield from _glob(filesystem, info.path, rest)
            elif not rest:
                yield from _files_below(filesystem, info.path) if is_folder else (info.path,)


def _files_below(filesystem: fs.FileSystem, folder: str) -> Iterator[str]:
    for info in _children(filesystem, folder):
        if _hidden(info.base_name):
            continue
        if info.type == fs.FileType.Directory:
            yield from _files_below(filesystem, info.path)
        else:
            yield info.path


def _not_in(folders: Collection[Path], paths: list[str]) -> list[str]:
    """Without Parquet files in these folders; nobody else's may be there (`folder.check_output`)."""
    own = {os.path.realpath(folder) for folder in folders}
    parents = {os.path.dirname(path) for path in paths}
    left_out = {parent for parent in parents if os.path.realpath(parent) in own}
    return [path for path in paths if not path.endswith(".parquet") or os.path.dirname(path) not in left_out]


def _children(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    found: list[fs.FileInfo] = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return found


def _hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _name_matches(name: str, pattern: str) -> bool:
    is_match = name == pattern or fnmatch.fnmatchcase(name, pattern)
    return is_match and (not _hidden(name) or pattern[0] == name[0])


def _near(filesystem: fs.FileSystem, root: str) -> str:
    siblings = [info.base_name for info in _children(filesystem, posixpath.dirname(root))]
    match = nearest(posixpath.basename(root), siblings)
    return f"; did you mean `{match}`, in the same folder?" if match else "; check the path"


def _format_of(paths: list[str], wanted: str, path: str) -> tuple[str, list[str]]:
    """The one format of the files, and the files that have it. Files of no known format are left out."""
    by_format: dict[str, list[str]] = {}
    for file in paths:
        plain = _COMPRESSED.sub("", file.lower())
        for name, extensions in EXTENSIONS.items():
            if plain.endswith(extensions):
                by_format.setdefault(name, []).append(file)
    if wanted != "auto":
        return wanted, by_format.get(wanted, paths) if len(paths) > 1 else paths
    if len(by_format) == 1:
        return by_format.popitem()
    if by_format:
        names = " and ".join(by_format)
        raise InputError(f"input.path: `{path}` has {names} files; choose one of them with input.format")
    known = ", ".join(f"{name} ({' '.join(extensions)})" for name, extensions in EXTENSIONS.items())
    raise InputError(f"input.path: no file name of `{path}` tells its format; input.format can be {known}")
