"""Lengths of earlier answers: read from an output folder, clipped to the new limits, or a user's error."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm.core import SamplingParams
from batchllm.errors import JobError
from batchllm.history import seeded_estimator


def write_answers(path, lengths, reasons):
    tokens = pa.array([[7] * length for length in lengths], pa.list_(pa.int32()))
    pq.write_table(pa.table({"output_tokens": tokens, "finish_reason": reasons}), path)


def mean(estimator, max_tokens, params=0):
    return int(estimator.mean_total(np.array([params]), np.array([max_tokens]))[0])


def test_without_history_outputs_are_as_long_as_they_may_be():
    assert mean(seeded_estimator(None, (SamplingParams(max_tokens=9),), "job"), 9) == 9


def test_mean_of_all_parts_without_failed_rows(tmp_path):
    write_answers(tmp_path / "part-00000.parquet", [10, 20, 0], ["stop", "stop", "error"])
    write_answers(tmp_path / "part-live-00001.parquet", [30], ["stop"])
    (tmp_path / "_run").mkdir()
    params = (SamplingParams(max_tokens=100), SamplingParams(max_tokens=15))
    estimator = seeded_estimator(tmp_path, params, "job")
    assert mean(estimator, 100) == 20
    assert mean(estimator, 15, params=1) == round((10 + 15 + 15) / 3)


def test_answers_that_were_cut_off_go_on(tmp_path):
    write_answers(tmp_path / "part-00000.parquet", [10, 64, 64], ["stop", "length", "length"])
    assert mean(seeded_estimator(tmp_path, (SamplingParams(max_tokens=64),), "job"), 64) == 46
    assert mean(seeded_estimator(tmp_path, (SamplingParams(max_tokens=200),), "job"), 200) == round(410 / 3)


def test_a_long_history_counts_from_end_to_end(tmp_path):
    lengths = list(range(1, 20_001))
    write_answers(tmp_path / "part-00000.parquet", lengths, ["stop"] * len(lengths))
    estimator = seeded_estimator(tmp_path, (SamplingParams(max_tokens=30_000),), "job")
    assert mean(estimator, 30_000) == pytest.approx(10_000, rel=0.01)


def test_folders_that_are_no_history(tmp_path):
    params = (SamplingParams(),)
    with pytest.raises(JobError, match=r"^job: plan.history: .* holds no answers; give the output.path"):
        seeded_estimator(tmp_path, params, "job")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(JobError, match="does not hold the answers of an earlier run"):
        seeded_estimator(tmp_path, params, "job")
    (tmp_path / "other.parquet").write_bytes(b"torn")
    with pytest.raises(JobError, match="does not hold the answers of an earlier run"):
        seeded_estimator(tmp_path, params, "job")
