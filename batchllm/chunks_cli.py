"""`batchllm chunks`: what a chunk store holds, whether it is whole, and how it is made smaller."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchllm import exit_codes

if TYPE_CHECKING:
    from batchllm.chunkcache.catalog import ChunkName
    from batchllm.chunkcache.store import ChunkStore

# The store is imported where it is used: help and wrong arguments must not wait for it.

_ANY_MODEL = bytes(16)
_DAY = 86_400.0

_store = click.argument("store", type=click.Path(path_type=Path))


@click.group()
def chunks() -> None:
    """Look after a store of precomputed chunks."""


@chunks.command("ls")
@_store
@click.option("--all", "every", is_flag=True, help="List every stored chunk.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
def list_chunks(store: Path, every: bool, as_json: bool) -> int:
    """Show what STORE holds, by model."""
    found = _opened(store)
    rows = _each_chunk(found) if every else _by_model(found)
    for row in rows:
        click.echo(json.dumps(row) if as_json else _line(row))
    if not as_json:
        from batchllm.report.sizes import size_text

        click.echo(f"{len(found):,} stored chunks, {size_text(found.used_bytes())}")
    _print_problems(found.problems)
    return exit_codes.OK


@chunks.command()
@_store
@click.option(
    "--remove", is_flag=True, help="Remove damaged chunks; they are computed again when they are needed."
)
def verify(store: Path, remove: bool) -> int:
    """Read every chunk of STORE and compare its checksums. Exit code 3 when any is damaged."""
    bad = []
    with _opened(store, write=remove) as found:
        good = found.check(lambda name, problem: bad.append((name, problem)))
        for name, problem in bad:
            click.echo(problem, err=True)
            if remove:
                found.remove_damaged(name)
        _print_problems(found.problems)
    what = "removed" if remove else "damaged; --remove takes them out"
    click.echo(f"{good:,} chunks are good" + (f", {len(bad):,} {what}" if bad else ""))
    return exit_codes.SOME_FAILED if bad else exit_codes.OK


@chunks.command()
@_store
@click.option(
    "--limit", metavar="SIZE", help="Remove the least recently used until at most this much is left."
)
@click.option(
    "--unused-for",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Remove what was not used for so many days.",
)
@click.option("--model", metavar="ID", help="Remove the chunks of this model; `ls` shows the ids.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def prune(store: Path, limit: str | None, unused_for: float | None, model: str | None, dry_run: bool) -> int:
    """Remove chunks from STORE."""
    from batchllm.chunkcache.store_folder import last_use
    from batchllm.report.sizes import size_text

    if limit is None and unused_for is None and model is None:
        raise click.UsageError("say what to remove: --limit, --unused-for or --model")
    if model == "":
        raise click.BadParameter(
            "must not be empty; `batchllm chunks ls` shows the ids", param_hint="--model"
        )
    most = _parsed_size(limit)
    with _opened(store, write=not dry_run) as found:
        oldest = time.time() - unused_for * _DAY if unused_for is not None else float("-inf")
        of_model = None if model is None else _model_named(found, model)
        unwanted = [
            chunk.name
            for chunk in found
            if chunk.model == of_model or last_use(found.folder.chunk(chunk.name)) < oldest
        ]
        before, number_before = found.used_bytes(), len(found)
        if dry_run:
            return _say_what_would_go(found, unwanted, most)
        found.remove(unwanted)
        if most is not None:
            found.shrink(most)
        click.echo(f"removed {number_before - len(found):,} chunks, {size_text(before - found.used_bytes())}")
    return exit_codes.OK


def _opened(store: Path, write: bool = False) -> ChunkStore:
    """A store that is there; none is made."""
    from batchllm.chunkcache.store import ChunkStore
    from batchllm.chunkcache.store_folder import StoreFolder

    return ChunkStore(store, _ANY_MODEL, write=write and StoreFolder(store).is_store())


def _model_named(found: ChunkStore, name: str) -> bytes:
    """The one model whose id begins so. Raises BadParameter."""
    models = {chunk.model for chunk in found if chunk.model.hex().startswith(name.lower())}
    if len(models) == 1:
        return models.pop()
    problem = (
        f"the ids of {len(models)} models begin with it; give more of one"
        if models
        else "no model has this id"
    )
    raise click.BadParameter(
        f"{name}: {problem}; `batchllm chunks ls {found.folder.path}` shows them", param_hint="--model"
    )


def _say_what_would_go(found: ChunkStore, unwanted: list[ChunkName], most: int | None) -> int:
    from batchllm.report.sizes import size_text

    going = set(unwanted)
    size = {chunk.name: chunk.disk_bytes for chunk in found}
    left = found.used_bytes() - sum(size[name] for name in going)
    for name in found.least_recently_used() if most is not None else ():
        if left <= (most or 0):
            break
        if name not in going:
            going.add(name)
            left -= size[name]
    click.echo(f"would remove {len(going):,} chunks, {size_text(sum(size[name] for name in going))}")
    return exit_codes.OK


def _by_model(found: ChunkStore) -> list[dict[str, Any]]:
    groups: dict[bytes, list[Any]] = defaultdict(list)
    for chunk in found:
        groups[chunk.model].append(chunk)
    return [
        {
            "model": model.hex(),
            **found.folder.about_model(model),
            "chunks": len({chunk.key for chunk in group}),
            "variants": len(group),
            "tokens": sum(chunk.num_tokens for chunk in group),
            "bytes": sum(chunk.disk_bytes for chunk in group),
            "codecs": ", ".join(sorted({chunk.codec.decode() for chunk in group})),
        }
        for model, group in groups.items()
    ]


def _each_chunk(found: ChunkStore) -> list[dict[str, Any]]:
    return [
        {
            "key": chunk.key.hex(),
            "variant": chunk.variant.hex(),
            "model": chunk.model.hex(),
            "tokens": chunk.num_tokens,
            "bytes": chunk.disk_bytes,
            "codec": chunk.codec.decode(),
            "context_tokens": chunk.context_tokens,
            "context_chunks": chunk.context_chunks,
        }
        for chunk in found
    ]


def _line(row: dict[str, Any]) -> str:
    from batchllm.report.sizes import size_text

    if "variants" in row:
        name = f"{row['path']} ({row['dtype']}), " if "path" in row else ""
        return (
            f"model {row['model'][:12]}: {name}{row['chunks']:,} chunks in {row['variants']:,} variants, "
            f"{row['tokens']:,} tokens, {size_text(row['bytes'])}, {row['codecs']}"
        )
    return (
        f"{row['key'][:12]} {row['variant'][:12]}  {row['tokens']:>6,} tokens  {size_text(row['bytes']):>10}  "
        f"{row['codec']:<4}  after {row['context_tokens']:,} tokens with {row['context_chunks']} chunks"
    )


def _parsed_size(limit: str | None) -> int | None:
    from batchllm.job_values import parse_bytes

    if limit is None:
        return None
    try:
        return parse_bytes(limit)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--limit") from None


def _print_problems(problems: list[str]) -> None:
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)
