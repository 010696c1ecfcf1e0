"""A plan as text, in 80 columns; what matters most comes first."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import PurePath

from batchllm.planner.explain import DeviceReport, PlanReport, PrefixReport

WIDTH = 80
_LABEL = 15


def plan_text(report: PlanReport) -> str:
    """The whole report. The first lines answer: how much work, how much is shared, how long, what is wrong."""
    blocks = [
        list(_head(report)),
        list(_warnings(report)),
        list(_devices(report)),
        list(_sharing(report)),
        list(_prefixes(report)),
        [_own_time(report)],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def plan_json(report: PlanReport) -> str:
    """Everything that the text is made from, and the share saved."""
    return json.dumps(
        {**asdict(report), "saved_fraction": report.saved_fraction}, indent=2, ensure_ascii=False
    )


def _head(report: PlanReport) -> Iterator[str]:
    yield _line(
        "job", f"{PurePath(report.job).name}, model {report.model} ({_short(report.parameters)} parameters)"
    )
    rows = f"{report.rows:,}"
    if report.faulty_rows:
        rows += f", {report.faulty_rows:,} of them without a prompt"
    if report.requests != report.rows - report.faulty_rows:
        rows += f"; {report.requests:,} answers"
    if report.sequences != report.requests:
        rows += f"; {report.sequences:,} different ones to compute"
    yield _line("rows", rows)
    yield _line("prompt tokens", f"{report.prompt_tokens:,}, the longest prompt {report.longest_prompt:,}")
    share = f"{report.saved_fraction:.1%} saved by sharing"
    yield _line("to compute", f"{report.computed_tokens:,} ({share})")
    if report.reordering_saves:
        yield _line("reordering", f"saves about {report.reordering_saves:,} of these tokens (prompt.reorder)")
    yield _line("output tokens", f"{report.output_tokens:,} expected ({report.output_source})")
    if report.sample_rows:
        sampled = f"{min(report.sample_rows, report.rows):,} rows are run first, and the rest is planned anew"
        yield _line("sample", f"{sampled} with the lengths of their answers (plan.sample_rows)")


def _warnings(report: PlanReport) -> Iterator[str]:
    for warning in report.warnings:
        yield textwrap.fill(f"! {warning}", WIDTH, subsequent_indent="  ")


def _devices(report: PlanReport) -> Iterator[str]:
    if not report.devices:
        return
    yield f"{'predicted for':<31}{'time':>11}{'steps':>9}{'KV peak':>11}{'of budget':>11}"
    for device in report.devices:
        name = device.name if device.workers == 1 else f"{device.workers} x {device.name}"
        if device.steps == 0 and report.sequences:
            yield f"{name[:30]:<31}{_lack(device)}"
            continue
        time = ("" if device.calibrated else "~") + duration(device.seconds)
        peak, budget = size(device.kv_peak_bytes), size(device.kv_budget_bytes)
        yield f"{name[:30]:<31}{time:>11}{device.steps:>9,}{peak:>11}{budget:>11}"
    yield _line("order", report.order_reason)
    shared = [device for device in report.devices if device.workers > 1 and device.steps]
    if shared:
        yield _line("workers", _workers(shared[0], report.computed_tokens))


def _workers(device: DeviceReport, alone: int) -> str:
    more = max(0, device.computed_tokens - alone)
    return (
        f"each of {device.workers} takes a stretch of the plan; prefixes that several need are computed by each: "
        f"{more:,} prompt tokens more ({more / max(1, alone):.1%}). The time is the slowest one's."
    )


def _lack(device: DeviceReport) -> str:
    if device.kv_budget_bytes <= 0:
        return f"no room: the weights take {size(device.weight_bytes)}"
    return "no sequence fits in KV memory"


def _sharing(report: PlanReport) -> Iterator[str]:
    yield f"{'tokens to compute':<31}{'tokens':>15}{'saved':>9}"
    rows = [
        ("without sharing", report.prompt_tokens),
        ("one prefix a row, published", report.published_rule_tokens),
        ("one prefix a row, at best", report.single_level_tokens),
        ("this plan", report.computed_tokens),
        ("optimum: distinct tokens", report.optimum_tokens),
    ]
    for name, tokens in rows:
        saved = 1 - tokens / report.prompt_tokens if report.prompt_tokens else 0.0
        yield f"{name:<31}{tokens:>15,}{saved:>9.1%}"
    if not report.levels:
        yield ""
        yield "no two rows share a beginning that is worth keeping"
        return
    yield ""
    yield f"{'level of the tree':<20}{'prefixes':>11}{'rows below':>12}{'tokens':>15}{'saved':>15}"
    for number, level in enumerate(report.levels, start=1):
        yield (
            f"{number:<20}{level.prefixes:>11,}{level.sequences:>12,}{level.tokens:>15,}{level.saved_tokens:>15,}"
        )


def _prefixes(report: PlanReport) -> Iterator[str]:
    if not report.prefixes:
        return
    shown, all_ = len(report.prefixes), report.shared_prefixes
    title = f"the {shown} of {all_:,} shared prefixes that save most" if shown < all_ else "shared prefixes"
    yield title
    yield f"{'rows':>9}{'tokens':>9}{'saved':>13}  begins with"
    for prefix in report.prefixes:
        yield _prefix(prefix)


def _prefix(prefix: PrefixReport) -> str:
    head = f"{prefix.sequences:>9,}{prefix.own_tokens:>9,}{prefix.saved_tokens:>13,}  "
    text = ("... " if prefix.level else "") + prefix.text
    room = WIDTH - len(head)
    return head + (text if len(text) <= room else text[: room - 3].rstrip() + "...")


def _own_time(report: PlanReport) -> str:
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
    text = f"planned in {sum(report.seconds.values()):.1f} s: {stages}; nothing was written"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def _line(label: str, text: str) -> str:
    lines = textwrap.wrap(text, WIDTH - _LABEL, break_on_hyphens=False) or [""]
    return "\n".join(f"{label if not number else '':<{_LABEL}}{line}" for number, line in enumerate(lines))


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min`, `2 h 05`, `3.4 days`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f}"
    return f"{seconds / 86400:.1f} days"


def size(count: float) -> str:
    """`812 KiB`, `3.4 GiB`."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if value >= 100 or unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def _short(count: int) -> str:
    """`3.8 billion`, `168 million`."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} billion"
    return f"{count / 1e6:.0f} million" if count >= 1e6 else f"{count:,}"
