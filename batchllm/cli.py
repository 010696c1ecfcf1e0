"""The `batchllm` command. Thin: it reads arguments, calls the pipeline and turns what happens into an exit code."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from batchllm import exit_codes
from batchllm.chunks_cli import chunks
from batchllm.collection import hold_collection, resume_collection
from batchllm.openai_batch.commands import convert_batch, run_batch

# Everything else is imported where it is used: help and wrong arguments must not wait for torch.

_GOES_ON = "run the same command again to go on"
_AFTER_INTERRUPTION = {
    **dict.fromkeys(("run", "run-batch", "eval"), _GOES_ON),
    "precompute": "run the same command again to add what is missing",
    "plan": "nothing was written",
    "convert-batch": "nothing was written",
    "chunks": "the store can be used as it is",
}


def _print_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from batchllm.versions import batchllm_version

        click.echo(f"batchllm {batchllm_version()}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Offline batch inference for LLMs: every prompt is known before the first token is computed."""


_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the job file, for example engine.kv_memory=1GiB. Can be given many times. "
    "A relative path starts at the job file's folder.",
)


@cli.command()
@click.argument("job", type=click.Path())
@_set_option
@click.option("--overwrite", is_flag=True, help="Replace the results of another job in the output folder.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Answer only the first N rows.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def run(job: str, overrides: Sequence[str], overwrite: bool, limit: int | None, quiet: bool) -> int:
    """Answer every row of the input of JOB, a YAML file.

    Running the same command again goes on where an interrupted run stopped.
    """
    hold_collection()
    from batchllm.job import load_job

    limits = [] if limit is None else [f"input.limit={limit}"]
    spec = load_job(job, [*overrides, *limits])

    from batchllm.pipeline import run_job

    summary = run_job(spec, overwrite=overwrite, quiet=quiet)
    if not quiet:
        click.echo(summary.text)
    return summary.exit_code


@cli.command()
@click.argument("job", type=click.Path())
@_set_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option(
    "--hardware",
    multiple=True,
    metavar="NAMES",
    help="Predict for these too: h100, h200, a100, l40s, mi300x.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    help="Predict for so many of each device: each takes a part of the rows.",
)
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Plan only the first N rows.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def plan(
    job: str,
    overrides: Sequence[str],
    as_json: bool,
    hardware: Sequence[str],
    workers: int,
    limit: int | None,
    quiet: bool,
) -> int:
    """Show what running JOB would share, compute and cost. Loads no weights and writes nothing."""
    hold_collection()
    from batchllm.job import load_job

    limits = [] if limit is None else [f"input.limit={limit}"]
    spec = load_job(job, [*overrides, *limits])

    from batchllm.dry_run import explain_job
    from batchllm.report.explain import plan_json, plan_text

    report = explain_job(spec, hardware, workers, quiet=quiet)
    click.echo(plan_json(report) if as_json else plan_text(report))
    return exit_codes.OK


@cli.command("eval")
@click.argument("job", type=click.Path())
@_set_option
@click.option("--previous", metavar="FOLDER", help="Compare with this night; none: with no other.")
@click.option("--overwrite", is_flag=True, help="Replace the evaluation in the output folder.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def evaluate(job: str, overrides: Sequence[str], previous: str | None, overwrite: bool, quiet: bool) -> int:
    """Run the tasks of JOB through lm-evaluation-harness and compare with the previous night.

    Exit code 4: a score is worse by more than compare.max_drop.
    """
    from importlib.util import find_spec

    from batchllm.errors import JobError

    if find_spec("lm_eval") is None:
        raise JobError("batchllm eval needs lm-evaluation-harness: pip install 'batchllm-engine[eval]'")
    from batchllm.evals.eval_job import load_eval_job

    spec = load_eval_job(job, overrides, previous)

    from batchllm.evals.nightly import run_eval

    summary = run_eval(spec, overwrite=overwrite, quiet=quiet)
    if not quiet:
        click.echo(summary.text)
    return summary.exit_code


@cli.command()
@click.argument("job", type=click.Path())
@_set_option
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Only the chunks of the first N rows.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def precompute(job: str, overrides: Sequence[str], limit: int | None, quiet: bool) -> int:
    """Compute the chunks of JOB and put them into its store, for `batchllm run` to use.

    Running it again adds what is missing.
    """
    from batchllm.job import load_job

    limits = [] if limit is None else [f"input.limit={limit}"]
    spec = load_job(job, [*overrides, *limits])

    from batchllm.chunk_precompute import precompute_job

    summary = precompute_job(spec, quiet=quiet)
    if not quiet:
        click.echo(summary.text)
    return exit_codes.SOME_FAILED if summary.faulty_rows else exit_codes.OK


cli.add_command(chunks)
cli.add_command(run_batch)
cli.add_command(convert_batch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave the process with its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: Sequence[str] | None) -> int:
    from batchllm.durable import WriteFailed
    from batchllm.errors import UserError

    try:
        found = cli.main(args=arguments, prog_name="batchllm", standalone_mode=False)
        code = found if isinstance(found, int) else exit_codes.OK
        if code == exit_codes.INTERRUPTED:
            _say_interrupted(arguments)
        return code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except WriteFailed as error:  # in the middle of a run: what was finished before stays
        click.echo(f"error: {error}", err=True)
        return exit_codes.FAULT
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        return exit_codes.USER_ERROR
    except (KeyboardInterrupt, click.Abort):
        _say_interrupted(arguments)
        return exit_codes.INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        click.echo(f"error: a fault in batchllm, not in your job: {error or type(error).__name__}", err=True)
        return exit_codes.FAULT
    finally:
        resume_collection()


def _say_interrupted(arguments: Sequence[str] | None) -> None:
    """And what of it is kept, which the command decides: the first argument that is no option of `batchllm` itself."""
    given = sys.argv[1:] if arguments is None else arguments
    command = next((argument for argument in given if not argument.startswith("-")), "")
    click.echo("; ".join(filter(None, ("interrupted", _AFTER_INTERRUPTION.get(command)))), err=True)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM, as sent by a scheduler that wants the machine back, is Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
