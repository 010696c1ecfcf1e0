"""The score of each task and metric with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import polars as pl
from scipy.stats import binomtest

SCHEMA = {
    "task": pl.String,
    "metric": pl.String,
    "filter": pl.String,
    "score": pl.Float64,
    "low": pl.Float64,  # 95% confidence interval
    "high": pl.Float64,
    "documents": pl.Int64,
    "higher_is_better": pl.Boolean,
    "error": pl.String,  # why a task has no score
}
_NORMAL_95 = 1.959964


def score_table(results: Mapping[str, Any], samples: pl.DataFrame) -> pl.DataFrame:
    """The scores of one `lm_eval.evaluate`; `samples` are its documents."""
    rows = []
    for task, figures in results["results"].items():
        better = results["higher_is_better"].get(task, {})
        for name, score in figures.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(score, int | float):
                continue
            chosen = (pl.col("task") == task) & (pl.col("metric") == metric) & (pl.col("filter") == filtered)
            values = samples.filter(chosen)["value"]
            low, high = _interval(float(score), figures.get(f"{metric}_stderr,{filtered}"), values)
            rows.append(
                (task, metric, filtered, float(score), low, high, len(values), better.get(metric), None)
            )
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def error_table(errors: Mapping[str, str]) -> pl.DataFrame:
    """Rows for tasks that have no score."""
    rows = [(task, "", "", None, None, None, 0, None, error) for task, error in errors.items()]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _interval(score: float, stderr: Any, values: pl.Series) -> tuple[float | None, float | None]:
    """Wilson's interval (1927) for shares of documents; score ± 1.96 standard errors for others, where there is one."""
    known = values.drop_nulls()
    if len(known) and known.is_in([0.0, 1.0]).all() and math.isclose(float(known.mean()), score):  # type: ignore[arg-type]
        interval = binomtest(int(known.sum()), len(known)).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)
    if isinstance(stderr, int | float) and math.isfinite(stderr):
        return score - _NORMAL_95 * stderr, score + _NORMAL_95 * stderr
    return None, None
