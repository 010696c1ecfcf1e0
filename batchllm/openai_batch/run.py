"""`batchllm run-batch`: a file of requests in, a file of responses out, one line for each and in their order.

Lines that cannot be answered get an error of their own. Requests become rows of a job beside the output file, in a
folder named after it (`out.jsonl.batch`), so the same command goes on where an interrupted one stopped. What a request
is answered depends on its custom_id and body, not on where its line stands.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from batchllm import exit_codes
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.durable import check_writable, make_folder, replacing
from batchllm.errors import InputError, JobError, OutputError, UserError
from batchllm.executor.model_folder import check_model_folder
from batchllm.file_lock import FileLock
from batchllm.job import JobSpec, make_job
from batchllm.openai_batch.requests import BadLine, BatchRequest, parse_line
from batchllm.openai_batch.responses import answer_line, error_line
from batchllm.openai_batch.rows import job_sections, write_rows
from batchllm.pipeline import run_job

# Keys of a job that requests decide, and what their answers are read from.
_NOT_TO_BE_SET = (
    "input prompt score generate.logprobs generate.top_logprobs generate.prompt_logprobs output.path "
    "output.keep"
).split()


def run_batch(
    requests: Path,
    output: Path,
    model: str,
    *,
    max_tokens: int = 256,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    quiet: bool = False,
) -> int:
    """What to exit with: OK, SOME_FAILED or INTERRUPTED. Raises UserError before anything is written.

    `max_tokens` is for requests that do not say. `overrides` are those of a job: {"engine.kv_memory": "1GiB"}.
    """
    check_readable(requests)
    check_target(output, "-o")
    check_apart(requests, output)
    _check_overrides(overrides)
    folder = output.with_name(output.name + ".batch").absolute()
    sections = {"model": {"path": model}, **job_sections(folder / "rows.parquet", folder / "answers")}
    job = make_job(sections, Path.cwd(), "run-batch", overrides)
    check_model_folder(job.model.path, job.model.trust_remote_code)
    with _claimed(folder):
        return _answer(job, requests, output, max_tokens, quiet)


def _answer(job: JobSpec, requests: Path, output: Path, max_tokens: int, quiet: bool) -> int:
    with replacing(Path(job.input.path)) as part:
        count = write_rows((line for _, line in read_requests(requests, max_tokens)), part)
    code = exit_codes.OK
    if count:
        code = run_job(job, quiet=quiet).exit_code
        if code == exit_codes.INTERRUPTED:
            return code
    tokenizer = load_tokenizer(job.model.path, job.model.trust_remote_code)
    answers = _answers(job.output.path) if count else iter(())
    name, created = Path(job.model.path).name, int(time.time())
    with replacing(output) as part, part.open("w", encoding="utf-8") as file:
        for number, line in _lines(requests, max_tokens):
            if isinstance(line, BadLine):
                code = exit_codes.SOME_FAILED
                record = error_line(number, line.custom_id, line.code, str(line))
            else:
                record = answer_line(number, line, next(answers), tokenizer, name, created)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return code


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """One run at a time in the folder beside an output. A run that cannot start leaves no folder that it made."""
    made = not folder.exists()
    make_folder(folder)
    lock = FileLock(folder / "lock", _refusal(folder))
    try:
        yield
    except UserError:
        if made and not (folder / "answers").exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


def _refusal(folder: Path) -> str:
    return (
        f"{folder}: another run-batch (process {{}}) is at work there; "
        "wait until it has ended or choose another -o"
    )


def _check_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises JobError for those without which answers cannot be brought to their requests."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        for name in _NOT_TO_BE_SET:
            if f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}."):
                raise JobError(f"--set {key}: the requests and -o decide what {name} is; remove it")


def read_requests(path: Path, max_tokens: int) -> Iterator[tuple[int, BatchRequest]]:
    """(line number, request) of the lines that are requests."""
    for number, line in _lines(path, max_tokens):
        if isinstance(line, BatchRequest):
            yield number, line


def _lines(path: Path, max_tokens: int) -> Iterator[tuple[int, BatchRequest | BadLine]]:
    """Every line that is not blank, from 1 on. A custom_id that comes again is an error."""
    seen: dict[str, int] = {}
    with reading(path) as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if not line:
                continue
            try:
                request = parse_line(line, max_tokens)
                first = seen.setdefault(request.custom_id, number)
                if first != number:
                    message = f"custom_id {request.custom_id!r} is that of line {first} too; ids must differ"
                    raise BadLine("duplicate_custom_id", message, request.custom_id)
                yield number, request
            except BadLine as error:
                yield number, error


def _answers(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The samples of each request, in the order of the requests."""
    rows = (
        row
        for part in sorted(folder.glob("part-*.parquet"))
        for batch in pq.ParquetFile(part).iter_batches()
        for row in batch.to_pylist()
    )
    for _, samples in groupby(rows, key=lambda row: row["custom_id"]):
        yield list(samples)


def bad_lines(path: Path, max_tokens: int) -> Iterator[tuple[int, BadLine]]:
    """(line number, what is wrong) of the lines that are no requests."""
    for number, line in _lines(path, max_tokens):
        if isinstance(line, BadLine):
            yield number, line


def check_readable(path: Path) -> None:
    """Raises InputError for a file that is not there or cannot be read."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    with reading(path):
        pass


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The file as bytes. What the operating system says about it meanwhile becomes one sentence of an InputError."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def check_target(path: Path, name: str) -> None:
    """Raises OutputError for a file that cannot be written; `name`: what named it. Writes nothing."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; {name} must name a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; make it or choose another one")
    check_writable(folder)


def check_apart(source: Path, target: Path) -> None:
    """Raises OutputError when both are one file, be it by way of links: writing one would destroy the other."""
    if target.exists() and target.samefile(source):
        raise OutputError(f"{target}: is the file {source}, which would be lost; choose another output")
