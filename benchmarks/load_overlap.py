"""How much of the loading of stored chunks is hidden behind compute.

    python -m benchmarks.rag --trace trace.jsonl
    python -m benchmarks.load_overlap trace.jsonl

The trace has a line for each layer that the loader decoded (and for each node whose files it read), and for each layer
that the model computed. Loading is hidden while the model's thread does anything but wait for it: layers, or what lies
between two steps (logits, sampling, scheduling).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

Spans = NDArray[np.float64]  # [n, 2] begin and end in seconds, ascending, apart from each other
_WIDTH = 60


def spans(events: Iterable[dict[str, Any]], *what: str) -> Spans:
    """When any of these happened."""
    found: list[list[float]] = []
    for begin, end in sorted((event["begin"], event["end"]) for event in events if event["what"] in what):
        if found and begin <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([begin, end])
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def length(some: Spans) -> float:
    return float((some[:, 1] - some[:, 0]).sum())


def common(one: Spans, other: Spans) -> float:
    """Seconds in which both happened."""
    total = 0.0
    for begin, end in one:
        low, high = np.maximum(other[:, 0], begin), np.minimum(other[:, 1], end)
        total += float(np.maximum(high - low, 0).sum())
    return total


def overlap(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the whole run."""
    loading, computing, waiting = (
        spans(events, "read", "decode"),
        spans(events, "compute"),
        spans(events, "wait"),
    )
    waited = common(loading, waiting)
    return {
        "loading": length(loading),
        "while_layers_compute": common(loading, computing),
        "while_waited_for": waited,
        "computing": length(computing),
        "hidden_share": 1 - waited / length(loading) if len(loading) else 1.0,
    }


def steps_of(events: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The computed layers of each step."""
    found: list[list[dict[str, Any]]] = []
    for event in events:
        if event["what"] == "compute":
            if event["layer"] == 0:
                found.append([])
            found[-1].append(event)
    return found


def timeline(events: Sequence[dict[str, Any]], first: int, count: int) -> list[str]:
    """Steps as lines of text, one character for a stretch of time: what was computed, waited for, and loaded."""
    steps = steps_of(events)[first : first + count]
    begin, end = steps[0][0]["begin"], steps[-1][-1]["end"]
    if first == 0:  # what the first step needs is fetched before it
        begin = min(event["begin"] for event in events)
    edges = np.linspace(begin, end, _WIDTH + 1)
    rows = [("layers", spans(events, "compute"), "#"), ("waiting", spans(events, "wait"), "w")]
    rows += [("reading", spans(events, "read"), "r"), ("decoding", spans(events, "decode"), "d")]
    lines = [f"steps {first + 1} to {first + len(steps)}, {end - begin:.2f} s from left to right"]
    for name, busy, mark in rows:
        shares = [common(np.array([cell]), busy) / (cell[1] - cell[0]) for cell in pairwise(edges)]
        line = "".join(mark if share > 0.1 else "." for share in shares)
        lines.append(f"{name:>9} |{line}|")
    return lines


def table(events: Sequence[dict[str, Any]]) -> list[str]:
    """Loading beside the computing of each step that loaded anything."""
    lines = ["| step | layers compute | loading meanwhile | waited for |", "|---|---|---|---|"]
    loading, waiting = spans(events, "read", "decode"), spans(events, "wait")
    before = min(event["begin"] for event in events)
    for number, step in enumerate(steps_of(events), start=1):
        whole = np.array(
            [[before, step[-1]["end"]]]
        )  # from the end of the step before: its nodes are fetched there
        before = step[-1]["end"]
        loaded = common(whole, loading)
        if loaded:
            computed = sum(event["end"] - event["begin"] for event in step)
            lines.append(f"| {number} | {computed:.3f} | {loaded:.3f} | {common(whole, waiting):.3f} |")
    return lines


@click.command()
@click.argument("trace", type=click.Path(exists=True, path_type=Path))
def main(trace: Path) -> None:
    """TRACE is what `benchmarks.rag --trace` wrote."""
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    for line in (*table(events), *timeline(events, 0, 4)):
        click.echo(line)
    found = overlap(events)
    click.echo(
        f"loading took {found['loading']:.3f} s, of which {found['hidden_share']:.1%} were hidden: "
        f"{found['while_layers_compute']:.3f} s while layers were computed, "
        f"{found['while_waited_for']:.3f} s were waited for; layers took {found['computing']:.2f} s"
    )


if __name__ == "__main__":
    main()
