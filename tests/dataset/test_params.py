"""Sampling parameters in columns: what a row brings is used, or is a fault of that row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm.core import SamplingParams
from batchllm.dataset.params import RowParams
from batchllm.dataset.reader import open_input
from batchllm.dataset.rows import RowFault
from batchllm.job import GenerateSpec, InputSpec

BIASES: list[Any] = [{"72": 90}, {"73": 90}, None, {"72": 1, "73": -1.5}]
WANTED: list[Any] = [((72, 90.0),), ((73, 90.0),), (), ((72, 1.0), (73, -1.5))]


def of_column(name: str, column: pa.Array) -> list[SamplingParams | str]:
    """The parameters of each row, or what is wrong with it, where `name` is taken from the column."""
    params = RowParams(GenerateSpec.model_validate({name: {"column": "x"}}))
    found = params.of(pa.record_batch([column], names=["x"]))
    return [item.reason if isinstance(item, RowFault) else params.params[item] for item in found]


@pytest.mark.parametrize("name", ["logit_bias", "choice", "bad_words", "max_tokens", "json_schema"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"5": ' * 100_000, r'["\ud83d"]', r'{"enum": ["\ud83d"]}'])
def test_text_that_is_hardly_json_is_a_fault_of_its_row(name: str, text: str) -> None:
    good = {"max_tokens": "7", "logit_bias": "{}", "json_schema": "{}"}.get(name, '["a"]')
    first, fault, last = of_column(name, pa.array([good, text, good]))
    assert isinstance(first, SamplingParams) and first == last
    assert isinstance(fault, str) and fault.startswith(f"column `x`: {name} must ") and len(fault) < 300


def test_rows_bias_different_tokens() -> None:
    """Arrow gives every mapping the fields of all."""
    as_structs = of_column("logit_bias", pa.array(BIASES))
    assert [params.logit_bias for params in as_structs if isinstance(params, SamplingParams)] == WANTED
    as_text = of_column("logit_bias", pa.array([bias and json.dumps(bias) for bias in BIASES]))
    assert as_text == as_structs
    as_maps = pa.array([bias and list(bias.items()) for bias in BIASES], pa.map_(pa.string(), pa.float64()))
    assert of_column("logit_bias", as_maps) == as_structs
    (nothing,) = of_column("logit_bias", pa.array([{"72": None}], pa.struct([("72", pa.int64())])))
    assert nothing == as_structs[2]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_biases_from_files(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{format}"
    if format == "jsonl":
        path.write_text("\n".join(json.dumps({"bias": bias}) for bias in BIASES))
    else:
        pq.write_table(pa.table({"bias": pa.array(BIASES)}), path)
    params = RowParams(GenerateSpec.model_validate({"logit_bias": {"column": "bias"}}))
    found = []
    for batch in open_input(InputSpec(path=str(path))).batches():
        found += [
            params.params[index].logit_bias for index in params.of(batch.data) if isinstance(index, int)
        ]
    assert found == WANTED


def test_schemas_as_mappings_have_their_own_fields_only() -> None:
    schemas = [
        {"type": "object", "properties": {"a": {"type": "string"}}},
        {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]},
    ]
    found = of_column("json_schema", pa.array(schemas))
    assert [
        json.loads(params.json_schema) for params in found if isinstance(params, SamplingParams)
    ] == schemas


@pytest.mark.parametrize("token", ["4294967296", "9" * 50, "-1", "1.0"])
def test_what_is_no_token_id(token: str) -> None:
    (fault,) = of_column("logit_bias", pa.array([json.dumps({token: 1})]))
    assert isinstance(fault, str) and "logit_bias must have token ids as keys" in fault


@pytest.mark.parametrize("bias", ["1" + "0" * 400, "1e999", "NaN", "true", '"x"'])
def test_what_is_no_bias(bias: str) -> None:
    (fault,) = of_column("logit_bias", pa.array([f'{{"5": {bias}}}']))
    assert isinstance(fault, str) and "logit_bias must have a number for token 5" in fault
