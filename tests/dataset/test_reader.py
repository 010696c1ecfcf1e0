from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.dataset.csv_rows import split_rows
from batchllm.dataset.reader import InputData, open_input
from batchllm.dataset.rows import RowFault
from batchllm.dataset.values import python_values
from batchllm.errors import InputError
from batchllm.job import InputSpec


def opened(path: Path | str, **options: Any) -> InputData:
    return open_input(InputSpec(path=str(path), **options), "job.yaml")


def rows_of(data: InputData, **options: Any) -> list[dict[str, Any]]:
    return [row for batch in data.batches(**options) for row in batch.data.to_pylist()]


def faults_of(data: InputData, **options: Any) -> dict[int, str]:
    faults, first = {}, 0
    for batch in data.batches(**options):
        faults |= {first + row: fault.reason for row, fault in batch.faults.items()}
        first += batch.num_rows
    return faults


def write_parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def error_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Which files


def test_files_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b", "a", "c/a", "B"):
        write_parquet(tmp_path / f"{name}.parquet", name=[name, name])
    assert [row["name"] for row in rows_of(opened(tmp_path))[::2]] == ["B", "a", "b", "c/a"]


def test_hidden_and_foreign_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "part.parquet", x=[1])
    for name in ("_run/part.parquet", ".cache/part.parquet", "_part.parquet", ".part.parquet"):
        write_parquet(tmp_path / name, x=[2])
    (tmp_path / "README.md").write_text("about")
    assert rows_of(opened(tmp_path)) == [{"x": 1}]
    assert rows_of(opened(tmp_path / "**/*.parquet")) == [{"x": 1}]
    assert rows_of(opened(tmp_path / "_part.parquet")) == [{"x": 2}]
    assert rows_of(opened(tmp_path / "_p*.parquet")) == [{"x": 2}]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.parquet", ["top"]),
        ("**/*.parquet", ["a/b/deep", "a/one", "c/one", "top"]),
        ("**", ["a/b/deep", "a/one", "c/one", "top"]),
        ("a/**/deep.parquet", ["a/b/deep"]),
        ("**/one.parquet", ["a/one", "c/one"]),
        ("[ac]/*.parquet", ["a/one", "c/one"]),
        ("?/one.*", ["a/one", "c/one"]),
        ("*/b", ["a/b/deep"]),
        ("a*", ["a/b/deep", "a/one"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_globs(tmp_path: Path, pattern: str, names: list[str], prefix: str) -> None:
    if prefix and not set(pattern).isdisjoint("[]?"):
        pytest.skip("in a URL these characters mean something else")
    for name in ("top", "a/one", "a/b/deep", "c/one"):
        write_parquet(tmp_path / f"{name}.parquet", name=[name])
    assert [row["name"] for row in rows_of(opened(f"{prefix}{tmp_path}/{pattern}"))] == names


def test_own_answers_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("rows", "out/part-00000", "out/deeper/rows"):
        write_parquet(data / f"{name}.parquet", name=[name])
    (data / "out" / "rows.csv").write_text("name\nx\n")
    (tmp_path / "link").symlink_to(data, target_is_directory=True)

    def found(path: Path | str, **options: Any) -> list[str]:
        opened = open_input(InputSpec(path=str(path), **options), without=[tmp_path / "link" / "out"])
        return [row["name"] for row in rows_of(opened)]

    assert found(data, format="parquet") == ["out/deeper/rows", "rows"]
    assert found(f"file://{data}/**/*.parquet") == ["out/deeper/rows", "rows"]
    assert found(data / "out", format="csv") == ["x"]
    assert found(data / "out" / "part-00000.parquet") == ["out/part-00000"]
    with pytest.raises(InputError, match="left out, and so are the job's own answers"):
        found(data / "out" / "*.parquet")


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    write_parquet(tmp_path / "part[1].parquet", x=[1])
    assert rows_of(opened(tmp_path / "part[1].parquet")) == [{"x": 1}]


def test_urls(tmp_path: Path) -> None:
    write_parquet(tmp_path / "my rows.parquet", x=[1])
    (tmp_path / "rows.csv").write_text("x\n2\n")
    url = tmp_path.as_uri()
    assert rows_of(opened(f"{url}/my%20rows.parquet")) == [{"x": 1}]
    assert rows_of(opened(url + "/", format="parquet")) == [{"x": 1}]
    assert rows_of(opened(f"{url}/rows.csv")) == [{"x": 2}]
    assert "URLs may begin with file://" in error_of("https://example.org/rows.parquet")


def test_missing_input_is_named_with_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    assert error_of(tmp_path / "rosw.csv") == (
        f"job.yaml: input.path: `{tmp_path}/rosw.csv` does not exist; did you mean `rows.csv`, in the same folder?"
    )
    assert error_of(tmp_path / "no/where.csv").endswith("does not exist; check the path")
    assert f"no file matches `{tmp_path}/*.jsonl`" in error_of(tmp_path / "*.jsonl")
    (tmp_path / "empty").mkdir()
    assert f"there is no file in `{tmp_path}/empty`" in error_of(tmp_path / "empty")


def test_format_of_files(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text('{"x": 1}\n')
    assert "input.format can be parquet (.parquet .pq), jsonl (.jsonl .ndjson), csv (.csv)" in error_of(
        tmp_path / "rows.txt"
    )
    assert rows_of(opened(tmp_path / "rows.txt", format="jsonl")) == [{"x": 1}]
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.JSONL").write_text('{"x": 2}\n')
    assert "has csv and jsonl files; choose one of them with input.format" in error_of(tmp_path)
    assert rows_of(opened(tmp_path, format="csv")) == [{"x": 1}]
    assert rows_of(opened(tmp_path, format="jsonl")) == [{"x": 2}]


# All formats


def write_any(folder: Path, format: str, rows: int) -> Path:
    path = folder / f"rows.{format}"
    values = [{"n": n, "text": f"row {n}"} for n in range(rows)]
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(values), path, row_group_size=7)
    elif format == "jsonl":
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    else:
        path.write_text("n,text\n" + "".join(f"{value['n']},{value['text']}\n" for value in values))
    return path


FORMATS = pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])


@FORMATS
def test_batches_keep_order_and_size(tmp_path: Path, format: str) -> None:
    data = opened(write_any(tmp_path, format, 25))
    assert data.num_rows == 25
    assert data.schema.names == ["n", "text"]
    assert data.schema.field("n").type == pa.int64()
    sizes = [batch.num_rows for batch in data.batches(batch_rows=10)]
    assert max(sizes) <= 10
    for _ in range(2):  # every call starts from the beginning
        rows = rows_of(data, batch_rows=10)
        assert rows == [{"n": n, "text": f"row {n}"} for n in range(25)]


@FORMATS
@pytest.mark.parametrize("limit", [0, 1, 7, 10, 24, 25, 99])
def test_limit(tmp_path: Path, format: str, limit: int) -> None:
    data = opened(write_any(tmp_path, format, 25), limit=limit)
    assert data.num_rows == min(limit, 25)
    assert [row["n"] for row in rows_of(data, batch_rows=5)] == list(range(min(limit, 25)))


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_rows_beyond_the_limit_do_not_matter(tmp_path: Path, format: str) -> None:
    for name, value in (("a", 1), ("b", 2), ("c", "text")):
        text = f"x\n{value}\n" if format == "csv" else json.dumps({"x": value})
        (tmp_path / f"{name}.{format}").write_text(text)
    data = opened(tmp_path, limit=2)
    assert data.schema.field("x").type == pa.int64()
    assert rows_of(data) == [{"x": 1}, {"x": 2}]
    assert rows_of(opened(tmp_path, limit=3)) == [{"x": "1"}, {"x": "2"}, {"x": "text"}]


@FORMATS
def test_only_the_named_columns_are_read(tmp_path: Path, format: str) -> None:
    data = opened(write_any(tmp_path, format, 5))
    assert rows_of(data, columns=["text"])[4] == {"text": "row 4"}
    assert list(rows_of(data, columns=["text", "n"])[0]) == ["text", "n"]
    assert [batch.num_rows for batch in data.batches(columns=[])] == [5]


@FORMATS
def test_a_file_that_is_something_else(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"rows.{format}"
    path.write_bytes((b"x\n" if format == "csv" else b"") + random.Random(0).randbytes(10_000))
    if format == "parquet":
        assert "cannot be read as Parquet" in error_of(path)
    else:
        data = opened(path)
        assert data.num_rows
        assert sum(batch.num_rows for batch in data.batches()) == data.num_rows


# Parquet


def test_hive_partitions_are_columns(tmp_path: Path) -> None:
    base = tmp_path / "run=9"  # above the folder that is named: no column
    write_parquet(base / "lang=de/year=2024/a.parquet", x=[1])
    write_parquet(base / "lang=__HIVE_DEFAULT_PARTITION__/year=2025/a.parquet", x=[2])
    write_parquet(base / "lang=a%20b/year=2025/a.parquet", x=[3])
    expected = [
        {"x": 2, "lang": None, "year": 2025},
        {"x": 3, "lang": "a b", "year": 2025},
        {"x": 1, "lang": "de", "year": 2024},
    ]
    for path in (base, f"{base}/**/*.parquet", f"{base}/lang=*", base.as_uri()):
        assert rows_of(opened(path)) == expected
    assert rows_of(opened(base), columns=["lang"])[1] == {"lang": "a b"}
    assert rows_of(opened(base / "lang=de/year=2024/a.parquet")) == [{"x": 1}]


def test_files_with_different_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", x=pa.array([1], pa.int32()), text=["a"])
    write_parquet(tmp_path / "b.parquet", x=[2.5], text=pa.array(["b"], pa.large_string()), extra=[True])
    assert rows_of(opened(tmp_path)) == [
        {"x": 1.0, "text": "a", "extra": None},
        {"x": 2.5, "text": "b", "extra": True},
    ]
    path = write_parquet(tmp_path / "c.parquet", x=["text"])
    assert f"`{path}`: " in error_of(tmp_path)
    assert "Field x has incompatible types" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "type_"),
    [
        (pa.array([3, 2**60 + 1, None]), pa.array([0.5]), "double"),
        (
            pa.array([0, 253_402_214_400_000_000, None], pa.timestamp("us")),
            pa.array([1], pa.timestamp("ns")),
            "timestamp[ns]",
        ),
        (pa.array([[3], [2**60 + 1], None]), pa.array([[0.5]]), "list<element: double>"),
    ],
    ids=["numbers", "times", "lists"],
)
def test_a_value_that_the_type_of_all_files_cannot_hold_is_a_fault(
    tmp_path: Path, first: pa.Array, second: pa.Array, type_: str
) -> None:
    write_parquet(tmp_path / "a.parquet", x=first, y=[1, 2, 3])
    write_parquet(tmp_path / "b.parquet", x=second, y=[4])
    data = opened(tmp_path)
    assert faults_of(data) == {1: f"column `x` holds a value that is no {type_}"}
    (before, after) = (batch.data.column("x") for batch in data.batches())
    assert before.is_null().to_pylist() == [False, True, True]
    assert after.equals(second.cast(after.type))
    assert faults_of(data, columns=["y"]) == {}


def test_dictionary_columns_are_decoded(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", x=pa.array(["a", "b", "a", None]).dictionary_encode())
    data = opened(path)
    assert data.schema.field("x").type == pa.string()
    assert [batch.data.schema.field("x").type for batch in data.batches()] == [pa.string()]
    assert [row["x"] for row in rows_of(data)] == ["a", "b", "a", None]


TEXT = pa.array(["a", "b", None, "a"])
OTHER_TEXT = pa.array(["z", "a", None, "y"])


def in_lists(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays([0, 2, 4], values)


def in_structs(values: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([values, pa.array([1, 2, 3, 4])], names=["text", "n"])


def in_maps(values: pa.Array) -> pa.Array:
    return pa.MapArray.from_arrays([0, 2, 4], pa.array(["k", "l", "m", "n"]), values)


@pytest.mark.parametrize("around", [lambda values: values, in_lists, in_structs, in_maps])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TEXT.dictionary_encode(), OTHER_TEXT),
        (TEXT, OTHER_TEXT.dictionary_encode()),
        (TEXT.dictionary_encode(), OTHER_TEXT.dictionary_encode()),
        (TEXT.cast(pa.dictionary(pa.int8(), pa.string(), True)), OTHER_TEXT.dictionary_encode()),
        (TEXT.cast(pa.string_view()), OTHER_TEXT),
        (TEXT.cast(pa.string_view()), OTHER_TEXT.cast(pa.string_view())),
    ],
)
def test_dictionaries_and_views_are_plain_values(
    tmp_path: Path, around: Any, first: pa.Array, second: pa.Array
) -> None:
    """What writes results can neither take rows of views nor keep dictionaries that change from batch to batch."""
    write_parquet(tmp_path / "a.parquet", x=around(first))
    write_parquet(tmp_path / "b.parquet", x=around(second))
    data = opened(tmp_path)
    expected = [around(values.cast(pa.string())) for values in (first, second)]
    assert (
        data.schema.field("x").type
        == pq.read_schema(write_parquet(tmp_path / "_c", x=expected[0])).field("x").type
    )
    assert [row["x"] for row in rows_of(data)] == [value for part in expected for value in part.to_pylist()]


def test_whole_numbers_among_decimals(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", x=pa.array([Decimal("1.50")]))
    write_parquet(tmp_path / "b.parquet", x=[2, 2**63 - 1])
    data = opened(tmp_path)
    assert [row["x"] for row in rows_of(data)] == [Decimal("1.50"), Decimal("2.00"), None]
    assert list(faults_of(data)) == [2]


def test_odd_column_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", **{"a.b": [1], "c[0]": [2], "a": [{"b": 3}], "": [4]})
    assert rows_of(opened(path), columns=["a.b", "c[0]", "a", ""]) == [
        {"a.b": 1, "c[0]": 2, "a": {"b": 3}, "": 4}
    ]


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_two_columns_of_one_name(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"a.{format}"
    if format == "csv":
        path.write_text("x,y,x\n1,2,3\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]), path)
    assert "two columns named `x`; rename one of them" in error_of(path).replace(
        "of the same name", "named `x`"
    )


def test_a_damaged_row_group_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [bytes(50) for _ in range(1000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the header of its first page
    path.write_bytes(content)
    data = opened(path)
    with pytest.raises(InputError, match=r"^job\.yaml: input\.path: .*a\.parquet"):
        rows_of(data)


@pytest.mark.parametrize("group_rows", [2_000, 40_000])
def test_reading_parquet_needs_little_memory(tmp_path: Path, group_rows: int) -> None:
    rng = random.Random(0)
    rows, size = 40_000, 1_000
    with pq.ParquetWriter(
        tmp_path / "a.parquet", pa.schema([("x", pa.binary())]), compression="zstd"
    ) as writer:
        for _ in range(rows // group_rows):
            writer.write_table(pa.table({"x": [rng.randbytes(size) for _ in range(group_rows)]}))
    before = pa.total_allocated_bytes()
    peak = 0
    for _ in opened(tmp_path / "a.parquet").batches():
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < rows * size / 5


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_reading_lines_needs_little_memory(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"a.{format}"
    with path.open("w") as file:
        file.write("x\n" if format == "csv" else "")
        for number in range(20_000):
            text = f"{number} " + "x" * 500
            file.write(text + "\n" if format == "csv" else json.dumps({"x": text}) + "\n")
    tracemalloc.start()
    assert sum(batch.num_rows for batch in opened(path).batches(batch_rows=500)) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2


# JSON lines


def test_a_bad_line_is_a_faulty_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"q": "one", "n": 1}\r', b"", b"  ", b'{"q": "two"', b'{"q": "\xff"}', b'{"q": "\\ud83d"}',
        b'["q"]', b"null", b'{"q": "\\ud83d\\ude00", "n": 2}', b"[" * 100_000, b'{"n": ' + b"9" * 5_000 + b"}",
        b'{"q": "last"}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))  # no newline at the end
    data = opened(path)
    assert [row["q"] for row in rows_of(data)] == ["one", *[None] * 5, "😀", None, None, "last"]
    faults = faults_of(data, batch_rows=2)
    assert sorted(faults) == [1, 2, 3, 4, 5, 7, 8]
    assert faults[1] == "a.jsonl, line 4 is not valid JSON: Expecting ',' delimiter (column 12)"
    assert faults[2] == faults[3].replace("line 6", "line 5") == "a.jsonl, line 5 is not valid UTF-8 text"
    assert faults[4] == "a.jsonl, line 7 is not a JSON object"
    assert data.num_rows == 10


def test_columns_of_json_lines_come_from_all_lines(tmp_path: Path) -> None:
    values: list[dict[str, Any]] = [{"a": n, "b": None} for n in range(3_000)]
    values += [{"a": 0.5}, {"b": [{"role": "user"}]}, {"b": [{"role": "user", "content": "x"}]}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    rows = rows_of(opened(path))
    assert rows[7] == {"a": 7.0, "b": None}
    assert rows[-3:] == [
        {"a": 0.5, "b": None},
        {"a": None, "b": [{"role": "user", "content": None}]},
        {"a": None, "b": [{"role": "user", "content": "x"}]},
    ]
    assert opened(path, limit=10).schema.field("a").type == pa.int64()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{'q': 1}\n".encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        (b'\n[\n  {"q": 1}\n]\n', "is JSON over several lines; write every row as an object on one line"),
        (b'[{"q": 1},\n{"q": 2}]', "is JSON over several lines"),
        (b'{\r\n  "q": 1\r\n}\r\n', "is JSON over several lines"),
        (gzip.compress(b'{"q": 1}', mtime=0), "is compressed with gzip; let its name end in .gz"),
        (b"PAR1" + bytes(100), "is Parquet; set input.format to parquet"),
    ],
)
def test_files_that_are_no_json_lines_at_all(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert f"job.yaml: input.path: `{path}` {reason}" in error_of(path)


@pytest.mark.parametrize("line", [b"[1]", b'{"q": ', b"{,", b"\xff"])
def test_a_bad_first_line_is_a_faulty_row(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b'\n{"q": 1}\n')
    data = opened(path)
    assert [row["q"] for row in rows_of(data)] == [None, 1]
    assert list(faults_of(data)) == [0]


@pytest.mark.parametrize("levels", [31, 32, 33, 64, 70, 500])
def test_values_of_many_levels_become_text(tmp_path: Path, levels: int) -> None:
    value: Any = 1
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"x": value}))
    (row,) = rows_of(opened(path))
    assert row["x"] == (value if levels <= 32 else json.dumps(value))


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_long_lines_end_a_batch(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1024 rows of 2 MB each would be more text than an Arrow array can hold."""
    monkeypatch.setattr("batchllm.dataset.rows.BATCH_BYTES", 1000)
    path = write_any(tmp_path, format, 100)
    lines = path.read_text().splitlines()
    lines[50] = lines[50].replace("row", "x" * 1000 + "row")
    path.write_text("\n".join(lines))
    data = opened(path)
    assert [row["n"] for row in rows_of(data)] == list(range(100))
    widths = [sum(len(row["text"]) for row in batch.data.to_pylist()) for batch in data.batches()]
    assert len(widths) >= 2
    assert max(widths) < 2100


def test_values_of_no_common_type_become_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    values = ["text", 3, 2.5, True, [1, "ä"], {"k": {}}, None, 2**70]
    path.write_text("\n".join(json.dumps({"x": value, "e": {}}) for value in values))
    rows = rows_of(opened(path))
    texts = ["text", "3", "2.5", "true", '[1, "ä"]', '{"k": {}}', None, str(2**70)]
    assert [row["x"] for row in rows] == texts
    assert rows[0]["e"] == "{}"


def test_a_number_that_does_not_fit_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"x": 2**60 + 1}, *({"x": n} for n in range(2_000)), {"x": 0.5}]
    path.write_text("\n".join(map(json.dumps, lines)))
    data = opened(path)
    assert faults_of(data) == {0: "column `x` holds a value that is no double"}
    assert rows_of(data)[-1] == {"x": 0.5}


def test_compressed_lines_and_lines_of_several_files(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"x": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"y": 2}\n{')
    with pa.CompressedOutputStream(tmp_path / "c.JSONL.BR", "brotli") as stream:
        stream.write(b'{"x": 3}\n')
    data = opened(tmp_path)
    assert rows_of(data)[:2] == [{"x": 1, "y": None}, {"x": None, "y": 2}]
    assert faults_of(data)[2].startswith("b.jsonl, line 2 is not valid JSON")
    assert rows_of(data)[3] == {"x": 3, "y": None}


def test_empty_files_have_no_rows_and_no_columns(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).touch()
        data = opened(tmp_path / name)
        assert (data.num_rows, data.schema.names, rows_of(data)) == (0, [], [])


# CSV


def test_csv_is_text_but_for_whole_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "int,zero,float,flag,null,mixed\n"
        "1,007,1.50,true,NA,1\n"
        "-20,1,2,false,null,x\n"
        ",2,3,true,nan,3\n"
    )  # fmt: skip
    assert rows_of(opened(path)) == [
        {"int": 1, "zero": "007", "float": "1.50", "flag": "true", "null": "NA", "mixed": "1"},
        {"int": -20, "zero": "1", "float": "2", "flag": "false", "null": "null", "mixed": "x"},
        {"int": None, "zero": "2", "float": "3", "flag": "true", "null": "nan", "mixed": "3"},
    ]


def test_csv_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfq,r\r\n"a\nb, ""c""",\r\n"",x\r\n\r\n')
    assert rows_of(opened(path)) == [{"q": 'a\nb, "c"', "r": None}, {"q": "", "r": "x"}]


def test_csv_rows_with_another_number_of_cells_are_faulty(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,n\nbad\na,1\n\nbad\nbad,2,3\n"b\nc",2\nbad\n')
    data = opened(path)
    assert data.num_rows == 6
    assert rows_of(data, columns=["n", "q"]) == [
        {"n": None, "q": None}, {"n": 1, "q": "a"}, {"n": None, "q": None}, {"n": None, "q": None},
        {"n": 2, "q": "b\nc"}, {"n": None, "q": None},
    ]  # fmt: skip
    assert faults_of(data, batch_rows=4) == {
        0: "a.csv, row 2 has 1 cells instead of 2",
        2: "a.csv, row 4 has 1 cells instead of 2",
        3: "a.csv, row 5 has 3 cells instead of 2",
        5: "a.csv, row 7 has 1 cells instead of 2",
    }
    assert len(rows_of(opened(path, limit=3))) == 3


def test_csv_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'q,n\n5" pipe,1\n"a"b,2\n"a""b\n""c",3\n"a\n\n,""b",4\r\n"y\r\nz",\n"end"\n"never, closed\nx,5'
    )
    data = opened(path)
    assert rows_of(data) == [
        {"q": '5" pipe', "n": 1}, {"q": "ab", "n": 2}, {"q": 'a"b\n"c', "n": 3},
        {"q": 'a\n\n,"b', "n": 4}, {"q": "y\r\nz", "n": None}, {"q": None, "n": None}, {"q": None, "n": None},
        {"q": "x", "n": 5},
    ]  # fmt: skip
    assert faults_of(data) == {
        5: "a.csv, row 7 has 1 cells instead of 2",
        6: "a.csv, row 8 has a quote that is never closed",
    }


@given(st.lists(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=2,
                         max_size=2), max_size=6))  # fmt: skip
def test_csv_that_python_writes_is_read_back(rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    lines = io.BytesIO(text.getvalue().encode())
    assert list(split_rows(lines)) == [[cell.encode() for cell in row] for row in rows]


@given(st.binary().map(lambda data: data.replace(b"a", b'"').replace(b"b", b",").replace(b"c", b"\n")))
def test_no_csv_is_too_broken(data: bytes) -> None:
    assert len(list(split_rows(io.BytesIO(data)))) <= len(data) + 1


def test_csv_text_that_is_not_utf8_is_found_later(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"q,n\n\xff,1\nb,2\n\xfe,2,3\n")
    data = opened(path)
    assert [row["n"] for row in rows_of(data, columns=["n"])] == [1, 2, None]
    (batch,) = data.batches(columns=["q"])
    assert python_values(batch.data.column("q"), "q")[:2] == [
        RowFault("column `q` is not valid UTF-8 text"),
        "b",
    ]
    path.write_bytes("q,n\n".encode("utf-16"))
    assert "the header is not UTF-8 text" in error_of(path)


def test_csv_with_the_line_ends_of_old_macs_is_refused(tmp_path: Path) -> None:
    """All of it would be the header, and the job would have no rows."""
    (tmp_path / "a.csv").write_bytes(b"q,n\rx,1\ry,2\r")
    assert "its lines end in CR; convert them to end in LF" in error_of(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b'"q\r\nr",n\r\nx,1\r\n')
    assert rows_of(opened(tmp_path / "b.csv")) == [{"q\r\nr": "x", "n": 1}]


def test_csv_files_with_different_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,a\n")
    (tmp_path / "b.csv").write_text("z,x\nq,2\n")
    assert rows_of(opened(tmp_path)) == [{"x": 1, "y": "a", "z": None}, {"x": 2, "y": None, "z": "q"}]


def test_csv_with_a_header_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n")
    data = opened(tmp_path / "a.csv")
    assert (data.num_rows, data.schema.names, rows_of(data)) == (0, ["x", "y"], [])
