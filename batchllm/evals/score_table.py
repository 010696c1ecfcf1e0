"""The score of each task and metric with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
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
_RESAMPLES = 1000
_OF_MEAN_LOG_LIKELIHOOD: dict[str, Callable[[float], float]] = {
    "word_perplexity": lambda mean: math.exp(-mean),
    "byte_perplexity": lambda mean: math.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


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
            mine = samples.filter(chosen)
            low, high = _interval(metric, float(score), figures.get(f"{metric}_stderr,{filtered}"), mine)
            rows.append(
                (task, metric, filtered, float(score), low, high, len(mine), better.get(metric), None)
            )
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def error_table(errors: Mapping[str, str]) -> pl.DataFrame:
    """Rows for tasks that have no score."""
    rows = [(task, "", "", None, None, None, 0, None, error) for task, error in errors.items()]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _interval(
    metric: str, score: float, stderr: Any, samples: pl.DataFrame
) -> tuple[float | None, float | None]:
    """Wilson's interval (1927) for shares of documents; of perplexities the middle 95% of resampled sets of documents;
    score ± 1.96 standard errors for others, where there is one."""
    known = samples.select("value", "weight").drop_nulls().to_numpy()
    values, weights = known[:, 0], known[:, 1]
    if len(values) and np.isin(values, (0.0, 1.0)).all() and math.isclose(values.mean(), score):
        interval = binomtest(int(values.sum()), len(values)).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)
    of_mean = _OF_MEAN_LOG_LIKELIHOOD.get(metric)
    if len(values) and of_mean is not None:
        drawn = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
        means = (values * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
        low, high = np.quantile([of_mean(mean) for mean in means], (0.025, 0.975))
        return float(low), float(high)
    if isinstance(stderr, int | float) and math.isfinite(stderr):
        return score - _NORMAL_95 * stderr, score + _NORMAL_95 * stderr
    return None, None
