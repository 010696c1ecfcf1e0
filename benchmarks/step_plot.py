"""Draws the steps of a run and counts its valleys: steps less than half full although sequences waited.

    python -m benchmarks.compare --workloads groups --traces traces
    python -m benchmarks.step_plot traces/groups.parquet --out groups.png

Needs matplotlib (the extra `benchmarks`).
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import click

from batchllm.executor.trace import PARTS, StepRecord, load_trace

_COLOURS = {"prompt": "#4477aa", "decode": "#ee6677", "recomputed": "#bbbbbb"}


@click.command()
@click.argument("trace", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="default: beside the trace, .png")
def main(trace: Path, out: Path | None) -> None:
    """TRACE is what StepTrace.save wrote."""
    records = load_trace(trace)
    click.echo(summary(records))
    target = out or trace.with_suffix(".png")
    draw(records, trace.stem, target)
    click.echo(f"drawn to {target}")


def summary(records: list[StepRecord]) -> str:
    """Steps, valleys and where the time went, in two lines."""
    seconds = {part: sum(getattr(r, f"{part}_seconds") for r in records) for part in (*PARTS, "other")}
    total = sum(seconds.values())
    full = sum(2 * record.tokens >= record.budget_tokens for record in records)
    valleys = sum(record.is_valley for record in records)
    parts = ", ".join(f"{part} {spent / total:.1%}" for part, spent in seconds.items())
    return f"{len(records)} steps, {full} at least half full, {valleys} valleys\n{total:.2f} s: {parts}"


def draw(records: list[StepRecord], title: str, target: Path) -> None:
    """Over time: tokens by kind in each step, KV in use, and sequences running and waiting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges = [0.0, *accumulate(_seconds(record) for record in records)]
    begins = edges[:-1]
    figure, (steps, memory, sequences) = pyplot.subplots(
        3, sharex=True, figsize=(10, 7), layout="constrained"
    )
    steps.set_title(title)
    below = [0] * len(records)
    widths = [end - begin for begin, end in pairwise(edges)]
    for kind, colour in _COLOURS.items():
        heights = [getattr(record, f"{kind}_tokens") for record in records]
        steps.bar(begins, heights, widths, bottom=below, align="edge", color=colour, label=kind, linewidth=0)
        below = [low + height for low, height in zip(below, heights)]
    for begin, width, record in zip(begins, widths, records):
        if record.is_valley:
            steps.axvspan(begin, begin + width, color="#ccbb44", alpha=0.4, linewidth=0, zorder=0)
    steps.axhline(records[0].budget_tokens, color="black", linewidth=0.5)
    _lines(steps, "tokens in a step")
    memory.stairs([record.kv_tokens for record in records], edges, label="KV in use")
    _lines(memory, "tokens")
    for name in ("running", "waiting"):
        sequences.stairs([getattr(record, name) for record in records], edges, label=name)
    _lines(sequences, "sequences")
    sequences.set_xlabel("seconds")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _lines(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", fontsize="small")


def _seconds(record: StepRecord) -> float:
    return float(sum(getattr(record, f"{part}_seconds") for part in (*PARTS, "other")))


if __name__ == "__main__":
    main()
