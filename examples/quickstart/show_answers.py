"""Shows what `batchllm run examples/quickstart/job.yaml` answered, and how often it was right."""

from __future__ import annotations

from pathlib import Path

import polars as pl

ANSWERS = Path(__file__).parent / "answers"


def main() -> None:
    answers = pl.read_parquet(ANSWERS / "*.parquet").with_columns(pl.col("output").str.strip_chars())
    right = pl.col("output") == pl.col("gold")
    with pl.Config(
        tbl_rows=10, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, fmt_str_lengths=60
    ):
        print(answers.select("question", "output", "gold").head(8))
        print(
            answers.group_by("kind").agg(right.mean().round(3).alias("exact match"), pl.len().alias("rows"))
        )
    print(f"exact match {answers.select(right.mean()).item():.3f} over {len(answers)} rows, in {ANSWERS}")


if __name__ == "__main__":
    main()
