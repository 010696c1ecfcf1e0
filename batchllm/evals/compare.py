"""Tonight's scores against those of an earlier night, document by document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import binomtest, permutation_test

from batchllm.errors import JobError, first_line
from batchllm.evals.eval_job import CompareSpec
from batchllm.evals.samples import PAIR

_RESAMPLES = 9_999
_SCORE_COLUMNS = ["task", "metric", "filter", "score"]
_SAMPLE_COLUMNS = [*PAIR, "doc_hash", "value", "output", "answers"]
CHANGES = {
    "task": pl.String,
    "metric": pl.String,
    "filter": pl.String,
    "before": pl.Float64,
    "after": pl.Float64,
    "drop": pl.Float64,  # how much worse: absolute for scores from 0 to 1, relative for others; below 0: better
    "p": pl.Float64,  # of the paired test: how likely a change like this is by chance
    "paired": pl.Int64,  # documents that are the same on both nights
    "worse": pl.Int64,  # of these
    "better": pl.Int64,
    "unpaired": pl.Int64,  # documents of tonight that were not there, or not the same
    "regression": pl.Boolean,
}


@dataclass(frozen=True)
class Night:
    """A finished evaluation, as far as another one is compared with it."""

    path: Path
    scores: pl.DataFrame
    samples: pl.DataFrame


@dataclass(frozen=True)
class Comparison:
    """`flips`: every document whose value changed, with the outputs of both nights."""

    previous: Path
    changes: pl.DataFrame
    flips: pl.DataFrame

    @property
    def regressions(self) -> pl.DataFrame:
        return self.changes.filter("regression")


def previous_night(output: Path) -> Path | None:
    """The folder beside `output` that was finished last, `output` left out."""
    finished = [
        file
        for file in output.parent.glob("*/scores.parquet")
        if file.parent != output and not file.parent.name.startswith(".")
    ]
    return max(finished, key=lambda file: file.stat().st_mtime_ns).parent if finished else None


def read_night(path: Path) -> Night:
    """Raises JobError when there is no evaluation in the folder, or not all of it."""
    try:
        scores = pl.read_parquet(path / "scores.parquet", columns=_SCORE_COLUMNS)
        samples = pl.read_parquet(path / "samples.parquet", columns=_SAMPLE_COLUMNS)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise JobError(
            f"compare.previous: {path} is no evaluation that can be read ({first_line(error)}); "
            "name another folder, or none"
        ) from None
    return Night(path, scores, samples)


def compare(scores: pl.DataFrame, samples: pl.DataFrame, previous: Night, spec: CompareSpec) -> Comparison:
    """Scores and samples of tonight against another night."""
    old = previous.samples
    pairs = samples.join(old, on=[*PAIR, "doc_hash"], suffix="_before", how="inner")
    both = scores.filter(pl.col("score").is_not_null()).join(
        previous.scores,
        on=["task", "metric", "filter"],
        suffix="_before",
        how="inner",
    )
    rows = [_change(score, pairs, samples, spec) for score in both.iter_rows(named=True)]
    flips = pairs.filter(pl.col("value").ne_missing(pl.col("value_before"))).select(
        *PAIR,
        "prompt",
        "target",
        "value_before",
        "value",
        "output_before",
        "output",
        "answers_before",
        "answers",
    )
    return Comparison(previous.path, pl.DataFrame(rows, schema=CHANGES), flips)


def _change(
    score: dict[str, object], pairs: pl.DataFrame, samples: pl.DataFrame, spec: CompareSpec
) -> dict[str, object]:
    named = [pl.col(name) == score[name] for name in ("task", "metric", "filter")]
    mine = pairs.filter(*named).drop_nulls(["value", "value_before"])
    before, after = float(score["score_before"]), float(score["score"])  # type: ignore[arg-type]
    # Values of single documents: of a perplexity they are log-likelihoods, where more is better.
    sign = -1.0 if score["higher_is_better"] is False and not _is_perplexity(str(score["metric"])) else 1.0
    gain = sign * (mine["value"] - mine["value_before"]).to_numpy()
    p = _p_value(gain, bool(mine["value"].append(mine["value_before"]).is_in([0.0, 1.0]).all()))
    drop = after - before if score["higher_is_better"] is False else before - after
    if not (0.0 <= before <= 1.0 and 0.0 <= after <= 1.0) and before:
        drop /= abs(before)
    return {
        **{name: score[name] for name in ("task", "metric", "filter")},
        "before": before,
        "after": after,
        "drop": drop,
        "p": p,
        "paired": len(mine),
        "worse": int((gain < 0).sum()),
        "better": int((gain > 0).sum()),
        "unpaired": len(samples.filter(*named)) - len(mine),
        "regression": drop > spec.max_drop and p < spec.significance,
    }


def _is_perplexity(metric: str) -> bool:
    return "perplexity" in metric or "bits_per" in metric


def _p_value(gain: np.ndarray, binary: bool) -> float:
    """Two-sided. McNemar's exact test (1947) of right and wrong; for others the sign of each difference is permuted."""
    changed = gain[gain != 0]
    if not len(changed):
        return 1.0
    if binary:
        return float(binomtest(int((changed > 0).sum()), len(changed)).pvalue)
    found = permutation_test(
        (changed,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
