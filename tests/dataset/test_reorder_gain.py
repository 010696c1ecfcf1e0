from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_load import job_on, job_over

from batchllm.dataset.reader import open_input
from batchllm.dataset.reorder_gain import possible_reordering

ROWS: dict[str, Any] = {
    "q": [f"question {number}" for number in range(40)],
    "document": ["one long document that many rows ask about"] * 40,
    "passages": [[f"own {number}", "a passage", f"other {number % 3}"] for number in range(40)],
    "flags": [[True]] * 40,
}


@pytest.mark.parametrize(
    ("prompt", "reorder"),
    [
        ({"text": "{{ q }} {{ document }}"}, ("q", "document")),
        ({"text": "{{ document }} {{ q }}"}, None),  # as good as it can be
        ({"text": "{{ passages | join('\\n') }} {{ q }}"}, "passages"),
        ({"text": "{{ q }} {{ passages | join('\\n') }}"}, None),  # what is before them differs in every row
        ({"text": "{{ passages | join }}", "reorder": "passages"}, None),  # asked for already
        ({"messages": [{"role": "user", "content": "{{ q }}{{ document }}"}]}, ("q", "document")),
        ({"column": "q"}, None),
        ({"text": "{{ q }}"}, None),
        ({"text": "{{ flags }}"}, None),
    ],
)
def test_what_would_save_most(tmp_path: Path, prompt: dict[str, Any], reorder: object) -> None:
    job = job_over(tmp_path, ROWS, prompt=prompt)
    found = possible_reordering(job, open_input(job.input))
    assert (found and found.reorder) == reorder
    if found is not None:
        assert found.gain.saved > found.gain.saved_as_given
        assert 0 < found.gain.gained_share < 1


def test_the_first_rows_only(tmp_path: Path) -> None:
    columns = {"a": [str(number) for number in range(3_000)], "b": ["same"] * 3_000}
    job = job_over(tmp_path, columns, prompt={"text": "{{ a }}{{ b }}"})
    found = possible_reordering(job, open_input(job.input), most_rows=1)
    assert found is not None
    assert found.gain.saved == len("b same") * 1023  # a batch is not cut


def test_an_input_without_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    job = job_on(tmp_path / "rows.jsonl", prompt={"text": "{{ q }}"})
    assert possible_reordering(job, open_input(job.input)) is None
