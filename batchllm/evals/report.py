"""An evaluation as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from batchllm.evals.compare import Comparison

_SHOWN_FLIPS = 3  # of each regression
_SHOWN_TEXT = 60


def report_text(scores: pl.DataFrame, comparison: Comparison | None, faults: Sequence[str]) -> str:
    """The score table, what changed since the previous night, and what could not be evaluated."""
    lines = _table(scores.filter(pl.col("score").is_not_null()))
    if comparison is not None:
        lines += ["", *_changes(comparison)]
    if faults:
        lines += ["", "not evaluated:", *(f"  {fault}" for fault in faults)]
    return "\n".join(lines)


def _table(scores: pl.DataFrame) -> list[str]:
    rows = [("task", "metric", "score", "95% interval", "documents")]
    for score in scores.iter_rows(named=True):
        interval = "" if score["low"] is None else f"{score['low']:.4f} .. {score['high']:.4f}"
        metric = score["metric"] if score["filter"] == "none" else f"{score['metric']} ({score['filter']})"
        rows.append((score["task"], metric, f"{score['score']:.4f}", interval, str(score["documents"])))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _changes(comparison: Comparison) -> list[str]:
    changed = comparison.changes.filter(
        (pl.col("worse") > 0) | (pl.col("better") > 0) | (pl.col("drop") != 0.0)
    )
    name = comparison.previous.name
    lines = [] if len(changed) else [f"no change since {name}"]
    for change in changed.iter_rows(named=True):
        head = "REGRESSION" if change["regression"] else "changed"
        lines.append(
            f"{head} since {name}: {change['task']} {change['metric']} ({change['filter']}) "
            f"{change['before']:.4f} -> {change['after']:.4f}, p = {change['p']:.2g}; "
            f"{change['worse']} documents worse, {change['better']} better of {change['paired']}"
        )
        if change["regression"]:
            lines += _flips(comparison, change)
    unpaired = comparison.changes.filter(pl.col("unpaired") > 0)
    lines += [
        f"{change['task']} {change['metric']}: {change['unpaired']} documents are new or not the same as before"
        for change in unpaired.iter_rows(named=True)
    ]
    return lines


def _flips(comparison: Comparison, change: dict[str, object]) -> list[str]:
    mine = comparison.flips.filter(*(pl.col(name) == change[name] for name in ("task", "metric", "filter")))
    lines = [
        f"  document {flip['doc_id']}: {_short(flip['output_before'])} -> {_short(flip['output'])}, "
        f"target {_short(flip['target'])}"
        for flip in mine.head(_SHOWN_FLIPS).iter_rows(named=True)
    ]
    hidden = len(mine) - len(lines)
    return [*lines, *([f"  and {hidden} more in flips.parquet"] if hidden else [])]


def _short(text: str | None) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN_TEXT else shown[: _SHOWN_TEXT - 3] + "..."
