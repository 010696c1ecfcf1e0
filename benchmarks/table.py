"""The comparison as lines of text, at most 100 columns."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.measured import OURS

HEADER = f"""\
ours    median seconds of the whole job, model loaded
floor   least time for the matrix products / ours
out     our time outside the forward pass, in which greedy tokens are chosen too
MiB     our peak of memory while running, beyond weights and KV in use
        !: the process's peak, loading included, was above weights, KV budget and 600 MiB
equal   output tokens that are the same; start: those before the first difference

{"workload":<13}{"ours s":>7}{"floor":>6}{"out":>6}{"MiB":>6}  {"peer":<22}{"s":>8}{"ratio":>6} {"spread":<10}\
{"equal":>6}{"start":>6}"""


def lines(row: dict[str, Any]) -> list[str]:
    """One line for each peer."""
    ours = row["ours"]
    memory = f"{ours['other_bytes'] / 2**20:.0f}{'' if ours['rss_within'] else '!'}"
    first = (
        f"{row['workload']:<13}{ours['median_seconds']:>7.2f}{ours['share_of_floor']:>6.0%}"
        f"{ours['outside_forward']:>6.1%}{memory:>6}  "
    )
    peers = [_peer(peer) for peer in row["peers"]] or [""]
    return [(first if number == 0 else " " * len(first)) + text for number, text in enumerate(peers)]


def _peer(peer: dict[str, Any]) -> str:
    if "failed" in peer:
        return f"{peer['engine']:<22}{peer['failed'][:200]}"
    low, high = peer["ratio_spread"]
    return (
        f"{peer['engine']:<22}{peer['median_seconds']:>8.2f}{peer['ratio']:>6.2f} {f'{low:.2f}-{high:.2f}':<10}"
        f"{peer['equal_tokens']:>6.0%}{peer['common_start']:>6.0%}"
    )


def startup_lines(seconds: dict[str, list[float]]) -> list[str]:
    """Process start to first step, median of all starts."""
    if OURS not in seconds:
        return []
    ours = statistics.median(seconds[OURS])
    found = [f"{'start-up':<13}{ours:>7.2f}"]
    for engine, theirs in seconds.items():
        if engine != OURS:
            median = statistics.median(theirs)
            found.append(f"{'':<40}{engine:<22}{median:>8.2f}{median / ours:>6.2f}")
    return found
