"""`prompt.reorder` through whole runs: fewer tokens are computed, and a second run finds the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.jobs import exit_code_of, make_job, read_metrics, read_output, save_model, write_rows

TEXT = "{% for passage in passages %}{{ passage }}. {% endfor %}{{ question }}"


def rows_with_passages() -> list[dict[str, Any]]:
    passages = [f"passage number {number} of the shelf" for number in range(6)]
    return [
        {
            "id": f"row-{number}",
            "question": f"question {number}?",
            "passages": [f"only here, {number}", passages[number % 6], passages[number * 5 % 3]],
        }
        for number in range(12)
    ]


def test_shared_then_resumed_in_another_order(tmp_path: Path) -> None:
    model, rows = save_model(tmp_path / "model"), rows_with_passages()
    job = make_job(tmp_path, model, rows, prompt={"text": TEXT}, generate={"max_tokens": 2})
    assert exit_code_of("run", job, "--quiet") == 0
    as_given = read_metrics(tmp_path / "out")
    reordered = ("--quiet", "--set", "prompt.reorder=passages", "--set", "output.path=out2")
    assert exit_code_of("run", job, *reordered) == 0
    metrics, answers = read_metrics(tmp_path / "out2"), read_output(tmp_path / "out2")
    assert as_given["prompt_tokens_saved_by_reordering"] == 0
    assert metrics["prompt_tokens"] == as_given["prompt_tokens"]
    fewer = as_given["prompt_tokens_computed"] - metrics["prompt_tokens_computed"]
    assert fewer > 0.2 * metrics["prompt_tokens"]
    assert abs(metrics["prompt_tokens_saved_by_reordering"] - fewer) < 0.1 * metrics["prompt_tokens"]

    write_rows(tmp_path / "rows.parquet", rows[::-1])
    assert exit_code_of("run", job, *reordered) == 0
    assert read_metrics(tmp_path / "out2")["rows_resumed"] == len(rows)
    assert read_output(tmp_path / "out2").sort("id").equals(answers.sort("id"))
