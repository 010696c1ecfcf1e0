"""Lengths of earlier answers: read from an output folder, clipped to the new limits, or a user's error."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm.core import SamplingParams
from batchllm.errors import JobError
from batchllm.history import own_lengths, past_lengths, teach
from batchllm.planner.lengths import LengthEstimator


def write_answers(path, lengths, reasons, **columns):
    tokens = pa.array([[7] * length for length in lengths], pa.list_(pa.int32()))
    pq.write_table(pa.table({"output_tokens": tokens, "finish_reason": reasons, **columns}), path)


def taught(past, params, row_group=(), params_of=None):
    estimator = LengthEstimator()
    teach(estimator, past, params, np.array(row_group, dtype=np.int32), params_of)
    return estimator


def mean(estimator, max_tokens, params=0, group=-1):
    return int(estimator.mean_total(np.array([params]), np.array([max_tokens]), np.array([group]))[0])


def test_without_history_outputs_are_as_long_as_they_may_be():
    assert past_lengths(None, "job") is None
    assert mean(taught(None, (SamplingParams(max_tokens=9),)), 9) == 9


def test_mean_of_all_parts_without_failed_rows(tmp_path):
    write_answers(tmp_path / "part-00000.parquet", [10, 20, 0], ["stop", "stop", "error"])
    write_answers(tmp_path / "part-live-00001.parquet", [30], ["stop"])
    (tmp_path / "_run").mkdir()
    params = (SamplingParams(max_tokens=100), SamplingParams(max_tokens=15))
    estimator = taught(past_lengths(tmp_path, "job"), params, [0])
    assert mean(estimator, 100) == 20
    assert mean(estimator, 15, params=1) == round((10 + 15 + 15) / 3)


def test_answers_that_were_cut_off_go_on(tmp_path):
    write_answers(tmp_path / "part-00000.parquet", [10, 64, 64], ["stop", "length", "length"])
    past = past_lengths(tmp_path, "job")
    assert mean(taught(past, (SamplingParams(max_tokens=64),), [0]), 64) == 46
    assert mean(taught(past, (SamplingParams(max_tokens=200),), [0]), 200) == round(410 / 3)


def test_a_long_history_counts_from_end_to_end(tmp_path):
    lengths = sorted([*range(1, 201)] * 100)
    write_answers(tmp_path / "part-00000.parquet", lengths, ["stop"] * len(lengths))
    estimator = taught(past_lengths(tmp_path, "job"), (SamplingParams(max_tokens=300),), [0])
    assert mean(estimator, 300) == pytest.approx(100, rel=0.01)
    assert estimator.quantile(0, 0.9) == pytest.approx(180, rel=0.01)


def test_answers_teach_the_group_of_the_row_with_their_id(tmp_path):
    ids = [f"row-{number}" for number in range(120)]
    write_answers(tmp_path / "part-00000.parquet", [8] * 60 + [40] * 60, ["stop"] * 120, id=ids)
    present = pa.chunked_array([["new", *ids[30:60][::-1]], ids[60:90]])  # other rows, in another order
    past = past_lengths(tmp_path, "job", "id", present)
    params = (SamplingParams(max_tokens=100),)
    estimator = taught(past, params, [2] + [0] * 30 + [1] * 30)
    assert mean(estimator, 100) == mean(estimator, 100, group=2) == 24
    assert 8 <= mean(estimator, 100, group=0) <= 10
    assert 38 <= mean(estimator, 100, group=1) <= 40
    numbers = past_lengths(tmp_path, "job", "id", pa.chunked_array([[1, 2]]))
    assert (numbers.row == -1).all(), "ids of another type are no ids of this job"
    assert (past_lengths(tmp_path, "job", "name", present).row == -1).all()


def test_own_answers_teach_the_parameters_of_their_row(tmp_path):
    write_answers(tmp_path / "part-live-00000.parquet", [5, 50, 0], ["stop", "stop", "error"])
    write_answers(tmp_path / "part-live-00001.parquet", [7], ["stop"])
    parts = {"part-live-00000.parquet": np.array([3, 1, 2]), "part-live-00001.parquet": np.array([0])}
    past = own_lengths(tmp_path, parts, np.array([0, 1, 2, 3]))
    assert dict(zip(past.row.tolist(), past.tokens.tolist())) == {3: 5, 1: 50, 0: 7}
    params = (SamplingParams(max_tokens=100), SamplingParams(max_tokens=100, temperature=1.0))
    estimator = taught(past, params, [0, 0, 0, 0], np.array([0, 1, 1, 0], dtype=np.int32))
    assert mean(estimator, 100) == 6
    assert mean(estimator, 100, params=1) == 50
    assert own_lengths(tmp_path, {}, np.array([0])) is None
    (tmp_path / "part-live-00001.parquet").write_bytes(b"torn")
    assert own_lengths(tmp_path, parts, np.array([0, 1, 2, 3])) is None


def test_folders_that_are_no_history(tmp_path):
    with pytest.raises(JobError, match=r"^job: plan.history: .* holds no answers; give the output.path"):
        past_lengths(tmp_path, "job")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(JobError, match="does not hold the answers of an earlier run"):
        past_lengths(tmp_path, "job")
    (tmp_path / "other.parquet").write_bytes(b"torn")
    with pytest.raises(JobError, match="does not hold the answers of an earlier run"):
        past_lengths(tmp_path, "job")


def test_many_sets_of_parameters_are_taught_together(tmp_path):
    """Those that differ in their seed alone once, and what is one more kind with the largest of its limits."""
    write_answers(tmp_path / "part-00000.parquet", [10, 64] * 500, ["stop", "length"] * 500)
    past = past_lengths(tmp_path, "job")
    params = tuple(SamplingParams(max_tokens=200, seed=seed) for seed in range(20_000))
    params += tuple(SamplingParams(max_tokens=limit, min_p=0.5) for limit in range(1, 1000))
    estimator = LengthEstimator(params=params)
    teach(estimator, past, params, np.zeros(1, dtype=np.int32))
    assert mean(estimator, 200) == mean(estimator, 200, params=19_999) == 105
    assert mean(estimator, 999, params=len(params) - 1) == round((10 + 999) / 2)
    assert mean(estimator, 90, params=len(params) - 910) == 50
