"""`batchllm run-batch` and `batchllm convert-batch`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from batchllm import exit_codes
from batchllm.collection import hold_collection

_max_tokens = click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="For requests that do not say how long an answer may be.",
)


@click.command("run-batch")
@click.option("-i", "--input", "source", type=click.Path(path_type=Path), required=True, help="Requests.")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), required=True, help="Responses.")
@click.option("--model", required=True, help="Folder of a model, or its id on the hub.")
@_max_tokens
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A value of a job file, for example engine.kv_memory=1GiB. Can be given many times.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def run_batch(
    source: Path, target: Path, model: str, max_tokens: int, overrides: Sequence[str], quiet: bool
) -> int:
    """Answer an OpenAI batch file: a response for every line, in the order of the lines.

    Exits with 3 when some lines could not be answered; their lines say why.
    """
    hold_collection()
    from batchllm.openai_batch import run

    return run.run_batch(source, target, model, max_tokens=max_tokens, overrides=overrides, quiet=quiet)


@click.command("convert-batch")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@_max_tokens
def convert_batch(source: Path, target: Path, max_tokens: int) -> int:
    """Convert an OpenAI batch file to Parquet (.jsonl to .parquet), or requests back.

    Exits with 3 when some lines or rows are no requests and were left out.
    """
    from batchllm.openai_batch.convert import convert

    left_out = convert(source, target, max_tokens)
    for place, error in left_out:
        click.echo(f"{source}, {place}: {error}", err=True)
    return exit_codes.SOME_FAILED if left_out else exit_codes.OK
