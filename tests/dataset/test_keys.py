"""Request keys: equal when the answer must be equal, different when anything that decides it differs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.core import PromptTable, RequestTable, SamplingParams
from batchllm.dataset.keys import (
    _EARLIER,
    _LATER,
    make_requests,
    match_keys,
    rank_among_equals,
    sampling_identity,
)

SAMPLED = SamplingParams(temperature=0.7)


def prompts_of(
    rows: Sequence[Sequence[int]],
    params: Sequence[SamplingParams] = (SamplingParams(),),
    params_of: Sequence[int] | None = None,
    faults: dict[int, str] | None = None,
) -> PromptTable:
    lengths = [0 if faults and i in faults else len(row) for i, row in enumerate(rows)]
    tokens = [t for i, row in enumerate(rows) if not (faults and i in faults) for t in row]
    return PromptTable(
        tokens=np.array(tokens, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        params=tuple(params),
        params_of=np.array(params_of if params_of is not None else [0] * len(rows), dtype=np.int32),
        faults=faults or {},
    )


def ids_of(values: Sequence[object], chunk: int = 2) -> pa.ChunkedArray:
    array = pa.array(values)
    return pa.chunked_array([array.slice(i, chunk) for i in range(0, len(array), chunk)], type=array.type)


def keys(requests: RequestTable) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in requests.key]


def one_key(
    tokens: Sequence[int] = (1, 2, 3),
    params: SamplingParams = SAMPLED,
    row_id: object = None,
    configuration: bytes = b"model",
) -> tuple[int, int]:
    ids = None if row_id is None else ids_of([row_id])
    return keys(make_requests(prompts_of([tokens], [params]), ids, configuration))[0]


def test_shuffled_rows_have_shuffled_keys() -> None:
    rng = np.random.default_rng(0)
    rows = [[int(t) for t in rng.integers(0, 3, rng.integers(1, 9))] for _ in range(200)]
    rows = [list(r) for r in {tuple(r) for r in rows}]
    order = rng.permutation(len(rows))
    plain = keys(make_requests(prompts_of(rows), None, b"c"))
    shuffled = keys(make_requests(prompts_of([rows[i] for i in order]), None, b"c"))
    assert shuffled == [plain[i] for i in order]


def test_a_row_in_front_changes_no_other_key() -> None:
    rows = [[1, 2], [3], [1, 2]]
    assert keys(make_requests(prompts_of([[9], *rows]), None, b"c"))[1:] == keys(
        make_requests(prompts_of(rows), None, b"c")
    )


def test_identical_rows_stay_apart_in_input_order() -> None:
    rows = [[5, 6], [7], [5, 6], [5, 6]]
    found = keys(make_requests(prompts_of(rows), None, b"c"))
    assert len(set(found)) == 4
    without_the_last = keys(make_requests(prompts_of(rows[:3]), None, b"c"))
    assert found[:3] == without_the_last


def test_identical_rows_with_ids_do_not_depend_on_their_order() -> None:
    rows = [[5, 6], [5, 6], [5, 6]]
    forward = keys(make_requests(prompts_of(rows), ids_of(["a", "b", "c"]), b"c"))
    backward = keys(make_requests(prompts_of(rows), ids_of(["c", "b", "a"]), b"c"))
    assert forward == backward[::-1]
    assert len(set(forward)) == 3


def test_everything_that_decides_the_text_is_in_the_key() -> None:
    base = one_key()
    others = [
        one_key(tokens=(1, 2, 4)),
        one_key(tokens=(1, 2)),
        one_key(configuration=b"model2"),
        one_key(row_id=""),
        one_key(row_id=1),
        one_key(row_id="01"),
        one_key(row_id=b"1"),
    ]
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 17),
        ("temperature", 0.8),
        ("top_p", 0.5),
        ("top_k", 3),
        ("min_p", 0.1),
        ("seed", 1),
        ("stop", ("x",)),
        ("stop_token_ids", (4,)),
        ("ignore_eos", True),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("best_of", 3),
        ("repetition_penalty", 1.1),
        ("frequency_penalty", 0.5),
        ("presence_penalty", 0.5),
        ("logit_bias", ((3, 1.0),)),
        ("bad_words", ("x",)),
        ("allowed_token_ids", (4,)),
        ("min_tokens", 2),
        ("include_stop", True),
        ("skip_special_tokens", False),
        ("choice", ("x",)),
        ("regex", "x"),
        ("json_schema", "{}"),
        ("grammar", "start: x"),
    ],
)
def test_each_sampling_parameter_counts(field: str, value: object) -> None:
    changed = dataclasses.replace(SAMPLED, **{field: value})  # type: ignore[arg-type]
    assert one_key(params=changed) != one_key()


def test_every_field_of_sampling_parameters_is_decided_on() -> None:
    """A new field must be put into `sampling_identity`, or be added here with a reason."""
    known = {f.name for f in dataclasses.fields(SamplingParams)}
    fields = json.loads(sampling_identity(SAMPLED))
    assert set(fields) == {*_EARLIER} - {"n"}, "answers from before a field existed must keep their keys"
    assert known == {*_EARLIER, *_LATER}


def test_greedy_decoding_does_not_care_how_it_would_have_sampled() -> None:
    greedy = SamplingParams()
    same = dataclasses.replace(greedy, seed=7, top_p=0.1, top_k=5, min_p=0.3)
    assert one_key(params=same) == one_key(params=greedy)
    assert one_key(params=dataclasses.replace(greedy, max_tokens=3)) != one_key(params=greedy)


def test_stop_ids_are_a_set() -> None:
    first = dataclasses.replace(SAMPLED, stop_token_ids=(3, 1, 3))
    second = dataclasses.replace(SAMPLED, stop_token_ids=(1, 3))
    assert one_key(params=first) == one_key(params=second)


def test_ids_and_tokens_do_not_run_into_each_other() -> None:
    token = int.from_bytes(b"tabc", "little")
    assert one_key(tokens=(token, 1), row_id="") != one_key(tokens=(1,), row_id="abc")


def test_more_samples_keep_the_old_ones() -> None:
    rows = [[1], [2], [1]]
    params = [SAMPLED, dataclasses.replace(SAMPLED, n=3)]
    few = make_requests(prompts_of(rows, params, [0, 0, 0]), None, b"c")
    many = make_requests(prompts_of(rows, params, [1, 0, 1]), None, b"c")
    assert many.row.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert many.sample.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert many.row.dtype == np.int64
    assert many.sample.dtype == np.int32
    assert many.key.dtype == np.uint64
    assert len(set(keys(many))) == 7
    assert [keys(many)[i] for i in (0, 3, 4)] == keys(few)


def test_rows_without_a_prompt() -> None:
    faults = {1: "the prompt is empty", 2: "the prompt is empty", 3: "null"}
    rows = [[1], [], [], []]
    found = keys(make_requests(prompts_of(rows, faults=faults), None, b"c"))
    assert len(set(found)) == 4
    assert keys(make_requests(prompts_of(rows, faults=faults), None, b"other"))[1:] == found[1:]
    with_ids = keys(make_requests(prompts_of(rows, faults=faults), ids_of([1, 2, 3, 4]), b"c"))
    assert not set(with_ids) & set(found)
    # a row of no tokens that is not a fault is something else
    assert keys(make_requests(prompts_of([[]]), None, b"c"))[0] not in found


def test_no_rows() -> None:
    requests = make_requests(prompts_of([]), ids_of([]), b"c")
    assert len(requests) == 0
    assert requests.key.shape == (0, 2)


def test_ids_of_any_type() -> None:
    rows = [[1], [1], [1]]
    for values in (
        [1, None, 2],
        [1.5, None, float("inf")],
        [{"a": 1}, {"a": 2}, None],
        [[1], [], None],
        ["é", "\U0001f600", None],
    ):
        assert len(set(keys(make_requests(prompts_of(rows), ids_of(values), b"c")))) == 3
    dictionary = ids_of(["x", "y", "x"]).dictionary_encode()
    assert keys(make_requests(prompts_of(rows), dictionary, b"c")) == keys(
        make_requests(prompts_of(rows), ids_of(["x", "y", "x"]), b"c")
    )


def test_memory_mapped_tokens(tmp_path: Path) -> None:
    prompts = prompts_of([[1, 2], [3, 4, 5]])
    prompts.tokens.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.int32, mode="r")
    assert keys(make_requests(dataclasses.replace(prompts, tokens=mapped), None, b"c")) == keys(
        make_requests(prompts, None, b"c")
    )


@pytest.mark.parametrize(
    ("row_id", "key"),
    [
        ("a", (12769402145457693901, 17522324750047541442)),
        (7, (12797144501707557145, 10712562748779508083)),
        (0.5, (9977237441589467945, 7330743341414673748)),
        (datetime(2024, 2, 29, 12, 30), (4121836394692392328, 15940726020841102003)),
        (date(2024, 2, 29), (16065537673772675817, 17709564454916173295)),
    ],
)
def test_keys_are_those_of_earlier_versions(row_id: object, key: tuple[int, int]) -> None:
    """A change here makes every earlier result worthless: its rows would all be computed again."""
    assert one_key(row_id=row_id) == key


def test_an_id_is_the_same_in_a_column_of_another_type() -> None:
    """One added id, `A7` or 1.5, changes the type of them all."""
    assert one_key(row_id=7) == one_key(row_id="7") == one_key(row_id=7.0)
    whole = keys(make_requests(prompts_of([[1], [1]]), ids_of([1, 2]), b"c"))
    text = keys(make_requests(prompts_of([[1], [1], [1]]), ids_of(["2", "A7", "1"]), b"c"))
    assert [text[2], text[0]] == whole


small_keys = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30)


def as_array(values: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.array(values, dtype=np.uint64).reshape(-1, 2)


@given(small_keys)
def test_rank_among_equals(values: list[tuple[int, int]]) -> None:
    assert rank_among_equals(as_array(values)).tolist() == [values[:i].count(v) for i, v in enumerate(values)]


@given(small_keys, small_keys)
def test_match_keys(wanted: list[tuple[int, int]], stored: list[tuple[int, int]]) -> None:
    wanted = list(dict.fromkeys(wanted))
    expected = [wanted.index(v) if v in wanted else -1 for v in stored]
    assert match_keys(as_array(wanted), as_array(stored)).tolist() == expected
