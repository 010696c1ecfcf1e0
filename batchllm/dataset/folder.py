"""The output folder before anything is written: whose it is, and how it is emptied.

    OUT/part-live-NNNNN.parquet   answers in the order in which they were finished
    OUT/part-NNNNN.parquet        the whole result in input order
    OUT/_run/manifest.json        whose results these are, and how far they are
    OUT/_run/superseded/          answers that do not match the job now, see `superseded`
    OUT/_run/{lock,work,scratch,final,COMMIT}   while a run writes

Readers that scan OUT skip `_run` for its underscore.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from batchllm.dataset.parts import (
    ForeignFile,
    TornPart,
    has_part_name,
    job_digest,
    parquet_files,
    read_mark,
)
from batchllm.durable import check_writable, sync_folder, writing
from batchllm.errors import OutputError

MANIFEST_FORMAT = 1
_FILES_OF_A_RUN = ("manifest.json", "job.yaml", "metrics.json", "plan.parquet", "plan-sample.parquet")
_FOLDERS_OF_A_RUN = ("scratch", "final", "superseded")


class Folder:
    """Where things lie in an output folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = path / "_run"
        self.scratch = self.run / "scratch"
        self.final = self.run / "final"
        self.superseded = self.run / "superseded"
        self.commit_marker = self.run / "COMMIT"
        self.manifest = self.run / "manifest.json"
        self.lock = self.run / "lock"


def check_output(path: Path, identity: str, overwrite: bool = False) -> bool:
    """Whether `path` holds results of another job, to be replaced. Raises OutputError when a job with this identity
    must not write there, as another job's results are without `overwrite`. Writes nothing.

    `identity` says which job it is: the same for every run over the same input, whatever its settings.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; output.path must name a folder")
    check_writable(path)
    folder = Folder(path)
    ours, foreign = _whose_parts(folder)
    if foreign:
        raise OutputError(
            f"{path}: holds Parquet files that batchllm did not write ({foreign[0].name}), which even "
            "--overwrite leaves alone; choose another output.path"
        )
    try:
        _check_owner(folder, identity, ours)
    except OutputError:
        if not overwrite:
            raise
        return True
    return False


def remove_results(folder: Folder) -> None:
    """Empties an output folder: parts and run files of ours, nothing else. The lock stays."""
    with writing(folder.path):
        folder.commit_marker.unlink(missing_ok=True)  # first: a half-done removal must not be completed later
        for part in _whose_parts(folder)[0]:
            part.unlink(missing_ok=True)
        for name in _FILES_OF_A_RUN:
            (folder.run / name).unlink(missing_ok=True)
        for name in _FOLDERS_OF_A_RUN:
            if (folder.run / name).exists():
                shutil.rmtree(folder.run / name)
        sync_folder(folder.path)


def read_manifest(folder: Folder) -> dict[str, Any]:
    """Empty when there is none, or it is damaged: the parts speak for themselves."""
    try:
        manifest = json.loads(folder.manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _whose_parts(folder: Folder) -> tuple[list[Path], list[Path]]:
    """(ours, foreign). A damaged file is ours when it has the name of a part and stands beside a manifest."""
    ours, foreign = [], []
    has_manifest = bool(read_manifest(folder))
    for path in parquet_files(folder.path):
        try:
            read_mark(path)
            ours.append(path)
        except ForeignFile:
            foreign.append(path)
        except TornPart:
            (ours if has_manifest and has_part_name(path) else foreign).append(path)
        except PermissionError:
            raise OutputError(f"{path}: cannot be read by this user; choose another output.path") from None
    return ours, foreign


def _check_owner(folder: Folder, identity: str, parts: list[Path]) -> None:
    manifest = read_manifest(folder)
    if not parts:
        return
    if int(manifest.get("format", 0)) > MANIFEST_FORMAT:
        raise OutputError(
            f"{folder.path}: was written by a newer batchllm ({manifest.get('batchllm')}); "
            "update batchllm, choose another output.path or pass --overwrite to replace the results"
        )
    owner = str(manifest.get("identity", identity))
    jobs = {str(read_mark(part)["job"]) for part in parts if not _is_torn(part)}
    if owner != identity or jobs - {job_digest(identity)}:
        whose = f" ({owner})" if owner != identity else ""
        raise OutputError(
            f"{folder.path}: holds the results of another job{whose}; "
            "choose another output.path or pass --overwrite to replace them"
        )


def _is_torn(path: Path) -> bool:
    try:
        read_mark(path)
    except TornPart:
        return True
    return False
