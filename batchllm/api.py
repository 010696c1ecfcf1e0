"""`batchllm.run`: a job from Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchllm import exit_codes
from batchllm.job import load_job, make_job

if TYPE_CHECKING:
    from batchllm.pipeline import RunSummary


def run(
    job: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> RunSummary:
    """Runs a job file, or a job given as a mapping (paths then start at the working folder).

    `overrides` maps dotted keys to values: {"engine.kv_memory": "1GiB"}. Raises UserError when the job cannot
    start, and KeyboardInterrupt when Ctrl-C ended it early: what is finished is kept, and the same call goes on from
    there. Failed rows do not raise: see `.metrics.rows_error` and the `error` column of `.table`.
    """
    from batchllm.pipeline import run_job

    if isinstance(job, Mapping):
        spec = make_job(job, Path.cwd(), overrides=overrides or {})
    else:
        spec = load_job(job, overrides or {})
    summary = run_job(spec, overwrite=overwrite, quiet=quiet)
    if summary.exit_code == exit_codes.INTERRUPTED:  # a script must not go on with a part of the table
        raise KeyboardInterrupt
    return summary
