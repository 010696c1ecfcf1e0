"""What a person wants to know when a run has ended, on a screenful."""

from __future__ import annotations

from pathlib import Path

from batchllm.report.metrics import RunMetrics

_WIDTH = 80
_SHOWN_REASONS = 2


def summary_text(metrics: RunMetrics, out_path: Path) -> str:
    """At most 16 lines of at most 80 columns; only a long path makes a line longer."""
    lines = [
        _rows(metrics),
        f"prompt tokens  {_prompt_tokens(metrics)}",
        f"output tokens  {metrics.output_tokens:,}{_rate(metrics)}",
        *_wrapped("time           ", _time(metrics)),
        *_prediction(metrics),
        *_lengths(metrics),
        *_chunks(metrics),
        f"KV cache       {_kv(metrics)}",
        f"memory         {_bytes(metrics.rss_peak_bytes)} at most",
        f"answers        {_snippet(out_path)}",
        *_failed(metrics),
    ]
    return "\n".join(lines)


def _rows(metrics: RunMetrics) -> str:
    text = f"{metrics.rows_ok:,} rows answered, {metrics.rows_error:,} failed"
    if metrics.rows_resumed:
        text += f" ({metrics.rows_resumed:,} of them in earlier runs)"
    return text


def _failed(metrics: RunMetrics) -> list[str]:
    """How many rows failed for which of the commonest reasons; the rest are in the output."""
    shown = list(metrics.errors.items())[:_SHOWN_REASONS]
    texts = [f"{count:,}: {reason}" for reason, count in shown]
    others = metrics.rows_error - sum(count for _, count in shown)
    if others:
        texts.append(f"{others:,}{' more' if shown else ''}: the column error says why")
    lines = [f"{'' if number else 'failed rows':<15}{text}" for number, text in enumerate(texts)]
    return [line if len(line) <= _WIDTH else line[: _WIDTH - 3].rstrip() + "..." for line in lines]


def _prompt_tokens(metrics: RunMetrics) -> str:
    if not metrics.prompt_tokens:
        return "0"
    text = f"{metrics.prompt_tokens:,}, computed {metrics.prompt_tokens_computed:,}"
    if metrics.saved_fraction >= 0:
        return f"{text} ({metrics.saved_fraction:.1%} saved by sharing)"
    return f"{text} (more than once: KV memory was short)"


def _rate(metrics: RunMetrics) -> str:
    seconds = metrics.seconds.get("run", 0.0)
    if seconds <= 0:
        return ""
    both = metrics.prompt_tokens + metrics.output_tokens
    return f" ({metrics.output_tokens / seconds:,.0f}/s; {both / seconds:,.0f}/s with the prompts)"


def _time(metrics: RunMetrics) -> list[str]:
    stages = [f"{stage} {seconds:.1f}" for stage, seconds in metrics.seconds.items() if seconds >= 0.05]
    total = f"{metrics.wall_seconds:.1f} s"
    return [total + ":", *(f"{stage}," for stage in stages[:-1]), stages[-1]] if stages else [total]


def _prediction(metrics: RunMetrics) -> list[str]:
    """Of the seconds in which the model ran."""
    predicted, took = metrics.predicted.get("seconds"), metrics.seconds.get("run", 0.0)
    if predicted is None or took <= 0:
        return []
    doubt = "" if metrics.predicted.get("calibrated") else " for a CPU like this one"
    text = f"predicted {predicted:.1f} s{doubt}, took {took:.1f} s ({predicted / took - 1:+.0%})"
    return [f"run            {text}"]


def _lengths(metrics: RunMetrics) -> list[str]:
    """Of outputs. What all were expected to be, and how well that was refreshed while the job ran."""
    planned, refreshed = metrics.length_errors.get("planned"), metrics.length_errors.get("refreshed")
    if not planned or not refreshed:
        return []
    return [
        f"lengths        {metrics.mean_output_tokens:,.1f} tokens on average, planned "
        f"{planned['mean_expected']:,.1f}; off by {planned['mean_absolute_error']:,.1f}, "
        f"later {refreshed['mean_absolute_error']:,.1f}"
    ]


def _chunks(metrics: RunMetrics) -> list[str]:
    """What stored chunks saved, and what lossy reuse did to answers."""
    figures = metrics.chunks
    if not figures:
        return []
    again = figures.get("repaired_tokens", 0)
    placed = f"{figures.get('placed_tokens', 0):,} prompt tokens from the store"
    lines = [f"chunks         {placed}, {again:,} of them computed again"]
    quality = figures.get("quality")
    if quality:
        lines.append(
            f"quality        {quality['exact_match']:.1%} of {quality['answers']} answers as without reuse, "
            f"F1 {quality['f1']:.1%}, tokens {quality['token_agreement']:.1%}"
        )
    return lines


def _kv(metrics: RunMetrics) -> str:
    text = f"{_bytes(metrics.kv_peak_bytes)} of {_bytes(metrics.kv_budget_bytes)} at most"
    if metrics.preemptions:
        text += f"; {metrics.preemptions:,} preemptions"
    return text


def _snippet(out_path: Path) -> str:
    try:
        shown = out_path.absolute().relative_to(Path.cwd())
    except ValueError:
        shown = out_path
    return f"polars.read_parquet({(shown / '*.parquet').as_posix()!r})"


def _wrapped(label: str, words: list[str], width: int = _WIDTH) -> list[str]:
    lines = [label.rstrip()]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1].ljust(len(label) - 1)} {word}"
    return lines


def _bytes(count: int) -> str:
    """`812 KiB`, `3.4 GiB`."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit in ("bytes", "KiB") or value >= 100 else f"{value:.1f} {unit}"
