"""The output folder: what is written, what is taken over, what is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm.core import RequestResult
from batchllm.dataset.columns import RowReader
from batchllm.dataset.finish import final_parts
from batchllm.dataset.results import ResultStore, check_output, claim_output
from batchllm.durable import WriteFailed
from batchllm.errors import JobError, OutputError
from tests.dataset.results_world import IDENTITY, World, names

WORLD = World(names(range(35)))


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def read(out: Path) -> list[tuple[str, int, str, str]]:
    """What a person reads: (id, sample, note, output) in the order of `OUT/*.parquet`."""
    table = pl.read_parquet(out / "*.parquet")
    if "sample" not in table.columns:
        table = table.with_columns(sample=pl.lit(0))
    return table.select("id", "sample", "note", "output").rows()


def manifest(out: Path) -> dict:
    return json.loads((out / "_run" / "manifest.json").read_text())


def part_names(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.parquet"))


# ---- what a run leaves


def test_whole_result_in_input_order(tmp_path: Path) -> None:
    WORLD.run(tmp_path / "out")
    assert read(tmp_path / "out") == WORLD.rows()
    assert part_names(tmp_path / "out") == [f"part-0000{i}.parquet" for i in range(4)]
    assert [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "out").glob("*.parquet"))] == [
        10,
        10,
        10,
        5,
    ]
    assert sorted(p.name for p in (tmp_path / "out" / "_run").iterdir()) == [
        "job.yaml",
        "lock",
        "manifest.json",
    ]


def test_columns_and_types(tmp_path: Path) -> None:
    WORLD.run(tmp_path)
    table = pl.read_parquet(tmp_path / "*.parquet")
    assert dict(table.schema) == {
        "id": pl.String,
        "note": pl.String,
        "output": pl.String,
        "output_tokens": pl.List(pl.Int32),
        "finish_reason": pl.String,
        "error": pl.String,
        "prompt_tokens": pl.Int32,
        "shared_tokens": pl.Int32,
    }
    assert table["output_tokens"].to_list() == [list(name.encode()) for name in WORLD.names]
    assert table["shared_tokens"].to_list() == [i % 3 for i in range(35)]
    assert table["prompt_tokens"].to_list() == [len(name) for name in WORLD.names]
    assert table["error"].null_count() == 35


def test_samples_and_logprobs(tmp_path: Path) -> None:
    world = replace(WORLD, n=3, logprobs=True)
    world.run(tmp_path)
    assert read(tmp_path) == world.rows()
    table = pl.read_parquet(tmp_path / "*.parquet")
    assert table.schema["sample"] == pl.Int32
    assert table.schema["logprobs"] == pl.List(pl.Float32)
    assert table["logprobs"].to_list() == [[-0.5] * len(name) for name, *_ in world.rows()]


def test_zero_rows(tmp_path: Path) -> None:
    World([]).run(tmp_path)
    table = pl.read_parquet(tmp_path / "*.parquet")
    assert table.height == 0
    assert table.columns[:3] == ["id", "note", "output"]
    assert manifest(tmp_path)["status"] == "finished"
    assert World([]).run(tmp_path).num_resumed == 0
    WORLD.run(tmp_path)  # the input has grown
    assert read(tmp_path) == WORLD.rows()


def test_no_kept_columns(tmp_path: Path) -> None:
    requests = WORLD.requests
    with ResultStore.open(tmp_path, IDENTITY, requests, pa.table({}), part_rows=10) as store:
        WORLD.fill(store)
        store.finish()
    table = pl.read_parquet(tmp_path / "*.parquet")
    assert table["output"].to_list() == [row[3] for row in WORLD.rows()]
    assert table.columns[0] == "output"


def test_more_buckets_than_files_may_be_open(tmp_path: Path) -> None:
    world = World(names(range(300)))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (140, limits[1]))
    try:
        world.run(tmp_path, part_rows=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read(tmp_path) == world.rows()
    assert len(part_names(tmp_path)) == 150


def test_kept_columns_of_awkward_types(tmp_path: Path) -> None:
    rows = len(WORLD.names)
    words = pa.array([None if i % 5 == 0 else f"w{i % 3}" for i in range(rows)])
    kept = pa.table(
        {
            "id": pa.array(range(rows)),
            "category": pa.chunked_array([words[:9].dictionary_encode(), words[9:].dictionary_encode()]),
            "nan": pa.array([float("nan")] * rows),
            "nested": pa.array([{"a": [i, None]} for i in range(rows)]),
            "blob": pa.array([bytes([i]) for i in range(rows)]),
        }
    ).replace_schema_metadata({"pandas": "something that would not hold"})
    requests = WORLD.requests
    for done in (0, rows):
        with ResultStore.open(tmp_path, IDENTITY, requests, kept, part_rows=10) as store:
            assert store.done.sum() == done
            assert store._finished == bool(done), "a finished folder is recognised, whatever it keeps"
            WORLD.fill(store)
            store.finish()
    table = pl.read_parquet(tmp_path / "*.parquet")
    assert table["category"].to_list() == words.to_pylist()
    assert table["nested"].to_list() == [{"a": [i, None]} for i in range(rows)]
    assert table["blob"].to_list() == [bytes([i]) for i in range(rows)]


def test_text_that_is_no_text(tmp_path: Path) -> None:
    world = World(["a"])
    with world.open(tmp_path) as store:
        store.add([RequestResult(0, "half \ud800 pair \x00", (1,), "stop", None, 1, 0)])
        store.finish()
    assert pl.read_parquet(tmp_path / "*.parquet")["output"].to_list() == ["half ? pair \x00"]


@pytest.mark.parametrize("name", ["output", "finish_reason", "error"])
def test_a_kept_column_with_a_name_of_ours(tmp_path: Path, name: str) -> None:
    with pytest.raises(JobError, match=f"output.keep: the input column '{name}'"):
        ResultStore.open(tmp_path / "out", IDENTITY, WORLD.requests, pa.table({name: list(WORLD.names)}))
    assert not (tmp_path / "out").exists()


def test_sample_is_a_name_of_ours_only_when_there_are_samples(tmp_path: Path) -> None:
    kept = pa.table({"sample": list(WORLD.names)})
    ResultStore.open(tmp_path / "a", IDENTITY, WORLD.requests, kept).close()
    with pytest.raises(JobError, match="'sample'"):
        ResultStore.open(tmp_path / "b", IDENTITY, replace(WORLD, n=2).requests, kept)


# ---- while it runs


def test_parts_appear_when_full(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, 9)
        assert part_names(tmp_path) == []
        WORLD.fill(store, 1)
        assert part_names(tmp_path) == ["part-live-00000.parquet"]
        assert len(read(tmp_path)) == 10
        WORLD.fill(store, 3)
        assert len(read(tmp_path)) == 10
        store.flush()
        assert len(read(tmp_path)) == 13
        assert manifest(tmp_path)["status"] == "running"
        assert manifest(tmp_path)["counts"]["answered"] == 13


def test_parts_appear_when_old(tmp_path: Path) -> None:
    with WORLD.open(tmp_path, flush_seconds=0.0) as store:
        WORLD.fill(store, 2)
        assert len(read(tmp_path)) == 2


def test_a_full_part_in_one_call(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        requests = WORLD.requests
        store.add([WORLD.answer(i, requests) for i in range(25)])
        assert len(read(tmp_path)) == 20
        store.close()
        assert len(read(tmp_path)) == 25
        store.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the system what a descriptor is")
def test_a_part_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power cut would leave a part that is torn."""
    events: list[str] = []
    replace_file = os.replace

    def note_sync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def note_replace(source: Path, target: Path) -> None:
        replace_file(source, target)
        events.append(f"name {target.name}")

    store = WORLD.open(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    WORLD.fill(store, 10)
    first = "part-live-00000.parquet"
    assert events[:3] == [f"sync {first}.tmp", f"name {first}", "sync out"]
    events.clear()
    WORLD.fill(store)
    store.finish()
    committed = events.index("name COMMIT")
    assert {f"sync part-0000{i}.parquet" for i in range(4)} | {"sync final"} <= set(events[:committed])
    assert events[committed - 1] == "sync .COMMIT.tmp"
    assert events[committed + 1] == "sync _run"
    assert "name part-00000.parquet" in events[committed:]
    store.close()


def test_an_exception_keeps_what_is_done(tmp_path: Path) -> None:
    def interrupted() -> None:
        with WORLD.open(tmp_path) as store:
            WORLD.fill(store, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(read(tmp_path)) == 3
    assert manifest(tmp_path)["status"] == "interrupted"


def test_an_answer_comes_once(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        store.add([WORLD.answer(0, WORLD.requests)])
        with pytest.raises(AssertionError, match="answered twice"):
            store.add([WORLD.answer(0, WORLD.requests)])
        with pytest.raises(AssertionError, match="34 requests are not answered"):
            store.finish()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="may not write"):
        check_output(tmp_path / "out", IDENTITY)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def run_until_full() -> None:
        with WORLD.open(tmp_path) as store:
            WORLD.fill(store, 10)
            monkeypatch.setattr(os, "replace", full)
            WORLD.fill(store)

    with pytest.raises(WriteFailed, match=r"part-live-00001.*No space left on device"):
        run_until_full()
    monkeypatch.undo()
    assert len(read(tmp_path)) == 10
    store = WORLD.run(tmp_path)
    assert store.num_resumed == 10
    assert read(tmp_path) == WORLD.rows()


def test_two_runs_at_once(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, 12)
        with pytest.raises(OutputError, match=rf"process {os.getpid()}.*is writing this folder"):
            WORLD.open(tmp_path)
        with pytest.raises(OutputError, match="is writing this folder"):
            WORLD.open(tmp_path, overwrite=True)
    assert len(read(tmp_path)) == 12
    WORLD.open(tmp_path).close()


def test_a_claim_is_held_while_nothing_is_stored_yet(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with claim_output(out, IDENTITY) as claim:
        (claim.work_dir / "tokens").write_text("")
        with pytest.raises(OutputError, match="is writing this folder"), claim_output(out, IDENTITY):
            pass
        assert (claim.work_dir / "tokens").exists()
        with ResultStore.open(out, IDENTITY, WORLD.requests, WORLD.kept, claim=claim) as store:
            WORLD.fill(store)
            store.finish()
        with pytest.raises(OutputError, match="is writing this folder"), claim_output(out, IDENTITY):
            pass
    assert not claim.work_dir.exists()
    assert read(out) == WORLD.rows()
    with claim_output(out, IDENTITY):
        pass
    assert read(out) == WORLD.rows()


def test_a_claim_without_results_leaves_no_trace(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        with claim_output(out, IDENTITY) as claim:
            (claim.work_dir / "tokens").write_text("")
            raise JobError("the model cannot be loaded")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    for out in (tmp_path / "a" / "b", tmp_path / "mine"):
        with pytest.raises(JobError):
            fail(out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes.txt"]


def test_a_claim_finds_no_files_of_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "_run" / "work").mkdir(parents=True)
    (tmp_path / "_run" / "work" / "tokens").write_text("half")
    with claim_output(tmp_path, IDENTITY) as claim:
        assert list(claim.work_dir.iterdir()) == []


# ---- taking over


def test_resume(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, 17)
        answered = store.done.copy()
    with WORLD.open(tmp_path) as store:
        assert (store.done == answered).all()
        assert (store.num_resumed, store.num_superseded, store.notes) == (17, 0, [])
        WORLD.fill(store)
        store.finish()
    assert read(tmp_path) == WORLD.rows()
    assert manifest(tmp_path)["counts"] == {
        "requests": 35,
        "answered": 35,
        "errors": 0,
        "resumed": 17,
        "superseded": 0,
    }


def test_a_finished_job_is_not_written_again(tmp_path: Path) -> None:
    WORLD.run(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.parquet")}
    store = WORLD.run(tmp_path)
    assert store.num_resumed == 35
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.parquet")} == before
    assert manifest(tmp_path)["status"] == "finished"


def test_another_part_size(tmp_path: Path) -> None:
    WORLD.run(tmp_path)
    assert WORLD.run(tmp_path, part_rows=20).num_resumed == 35
    assert read(tmp_path) == WORLD.rows()
    assert len(part_names(tmp_path)) == 2


@pytest.mark.parametrize("finished", [True, False])
def test_rows_added_removed_reordered(tmp_path: Path, finished: bool) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, None if finished else 23)
        if finished:
            store.finish()
        answered = {WORLD.names[i] for i in np.flatnonzero(store.done)}
    order = np.random.default_rng(1).permutation(50)[:40]
    changed = World(names(order))
    with changed.open(tmp_path) as store:
        assert {changed.names[i] for i in np.flatnonzero(store.done)} == answered & set(changed.names)
        assert store.num_superseded == len(answered - set(changed.names))
        assert sorted(row[0] for row in read(tmp_path)) == sorted(answered & set(changed.names))
        changed.fill(store)
        store.finish()
    assert read(tmp_path) == changed.rows()


def test_reordered_rows_only(tmp_path: Path) -> None:
    WORLD.run(tmp_path)
    changed = World(WORLD.names[::-1])
    with changed.open(tmp_path) as store:
        assert store.done.all()
        store.finish()
    assert read(tmp_path) == changed.rows()


def test_more_and_fewer_samples(tmp_path: Path) -> None:
    two, three = replace(WORLD, n=2), replace(WORLD, n=3)
    assert two.run(tmp_path).num_resumed == 0
    assert three.run(tmp_path).num_resumed == 70
    assert read(tmp_path) == three.rows()
    one = WORLD.run(tmp_path)
    assert (one.num_resumed, one.num_superseded) == (35, 70)
    assert read(tmp_path) == WORLD.rows()
    assert "sample" not in pl.read_parquet(tmp_path / "*.parquet").columns


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", [{"configuration": b"other"}, {"max_tokens": 5}])
def test_a_changed_model_or_sampling(tmp_path: Path, change: dict, finished: bool) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, None if finished else 21)
        if finished:
            store.finish()
        answered = int(store.done.sum())
    changed = replace(WORLD, **change)
    with changed.open(tmp_path) as store:
        assert (store.num_resumed, store.num_superseded) == (0, answered)
        assert store.notes[0].startswith(f"{answered} earlier answers no longer match")
        assert part_names(tmp_path) == []
        aside = pl.read_parquet(tmp_path / "_run/superseded/*/*.parquet")
        assert set(aside["output"]) <= {row[3] for row in WORLD.rows()}
        assert aside.height == answered
        changed.fill(store)
        store.finish()
    assert read(tmp_path) == changed.rows()


def test_only_the_latest_generation_is_kept_aside(tmp_path: Path) -> None:
    worlds = [replace(WORLD, configuration=name) for name in (b"first", b"second", b"third")]
    for world in worlds:
        world.run(tmp_path)
    aside = pl.read_parquet(tmp_path / "_run/superseded/*/*.parquet")
    assert set(aside["output"]) == {row[3] for row in worlds[1].rows()}
    worlds[2].run(tmp_path)  # nothing new is set aside, so nothing old is thrown away
    assert pl.read_parquet(tmp_path / "_run/superseded/*/*.parquet").height == 35


def test_changed_kept_columns_are_read_from_the_present_input(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, 25)
    changed = replace(WORLD, note="new note of")
    with changed.open(tmp_path) as store:
        assert store.num_resumed == 25
        assert {row[2].rsplit(" ", 1)[0] for row in read(tmp_path)} == {"new note of"}
        changed.fill(store)
        store.finish()
    assert read(tmp_path) == changed.rows()
    with ResultStore.open(
        tmp_path, IDENTITY, WORLD.requests, WORLD.kept.select(["id"]), part_rows=10
    ) as store:
        assert store.done.all()
        assert "note" not in pl.read_parquet(tmp_path / "*.parquet").columns
        store.finish()
    assert pl.read_parquet(tmp_path / "*.parquet")["id"].to_list() == WORLD.names


def test_errors_of_the_input_stay_and_others_are_tried_again(tmp_path: Path) -> None:
    world = replace(WORLD, faults={3: "the prompt is empty", 20: "null"})
    requests = world.requests
    with world.open(tmp_path) as store:
        for request in (0, 1, 3, 5, 20):
            store.add([world.answer(request, requests)])
        for request in (7, 8):
            store.add([RequestResult(request, None, (), "error", "out of memory", 3, 0)])
        assert store.num_errors == 4
        assert store.errors.commonest() == {"out of memory": 2, "the prompt is empty": 1, "null": 1}
    with world.open(tmp_path) as store:
        assert np.flatnonzero(store.done).tolist() == [0, 1, 3, 5, 20]
        assert store.num_errors == 2
        assert store.errors.commonest() == {"the prompt is empty": 1, "null": 1}
        assert store.notes == ["2 rows that failed in an earlier run are tried again"]
        assert not store.num_superseded
        world.fill(store)
        store.finish()
    table = pl.read_parquet(tmp_path / "*.parquet")
    assert table.filter(finish_reason="error").select("id", "error", "output").rows() == [
        ("row3", "the prompt is empty", None),
        ("row20", "null", None),
    ]
    assert manifest(tmp_path)["counts"]["errors"] == 2
    assert world.run(tmp_path).num_errors == 2


def test_the_manifest_can_be_lost(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, 17)
    for damage in (lambda p: p.write_text("{half"), lambda p: p.unlink()):
        damage(tmp_path / "_run" / "manifest.json")
        with WORLD.open(tmp_path) as store:
            assert store.num_resumed == 17
        assert len(manifest(tmp_path)["parts"]) == 2
    shutil.rmtree(tmp_path / "_run")
    assert WORLD.run(tmp_path).num_resumed == 17


def test_a_copied_part_gives_no_row_twice(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, 12)
    shutil.copy(tmp_path / "part-live-00000.parquet", tmp_path / "part-live-00000 (copy).parquet")
    with WORLD.open(tmp_path) as store:
        assert store.num_resumed == 12
        assert len(read(tmp_path)) == 12
        WORLD.fill(store)
        store.finish()
    assert read(tmp_path) == WORLD.rows()


# ---- damage


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_part(tmp_path: Path, size: int, finished: bool) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, None if finished else 30)
        if finished:
            store.finish()
    part = sorted(tmp_path.glob("*.parquet"))[1]
    os.truncate(part, size if size >= 0 else part.stat().st_size - 1)
    with WORLD.open(tmp_path) as store:
        assert store.num_resumed == (25 if finished else 20)
        assert store.notes == [
            f"1 damaged parts were set aside in {tmp_path / '_run/superseded'}; their rows are computed again"
        ]
        assert len(read(tmp_path)) == store.num_resumed
        WORLD.fill(store)
        store.finish()
    assert read(tmp_path) == WORLD.rows()


def damage_a_page(part: Path) -> None:
    output = pq.read_metadata(part).row_group(0).column(2)
    data = bytearray(part.read_bytes())
    data[output.dictionary_page_offset + output.total_compressed_size - 3] ^= 1
    part.write_bytes(data)


def test_a_damaged_page_is_found_when_the_part_is_read(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, 30)
    damage_a_page(tmp_path / "part-live-00001.parquet")
    with pytest.raises(
        WriteFailed, match=r"part-live-00001.parquet: was damaged.*run the same command again"
    ):
        WORLD.run(tmp_path)
    store = WORLD.run(tmp_path)
    assert store.num_resumed == 25
    assert read(tmp_path) == WORLD.rows()


def test_a_damaged_page_of_a_part_with_a_row_too_many(tmp_path: Path) -> None:
    """It is set aside for that row, and then once more for the damage."""
    with WORLD.open(tmp_path) as store:
        WORLD.fill(store, 30)
        gone = int(store.parts["part-live-00001.parquet"][4])
    damage_a_page(tmp_path / "part-live-00001.parquet")
    world = World([name for row, name in enumerate(WORLD.names) if row != gone])
    with world.open(tmp_path) as store:
        assert store.num_resumed == 20
        assert part_names(tmp_path) == ["part-live-00000.parquet", "part-live-00002.parquet"]
        world.fill(store)
        store.finish()
    assert read(tmp_path) == world.rows()


# ---- whose folder it is


def test_a_new_folder_is_not_made_by_looking(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b", IDENTITY)
    assert not (tmp_path / "a").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match=r"is a file; output.path must name a folder"):
        check_output(tmp_path / "out", IDENTITY)
    with pytest.raises(OutputError, match=r"out/below: cannot be written"):
        check_output(tmp_path / "out" / "below", IDENTITY)


@pytest.mark.parametrize("name", ["data.parquet", "part-00000.parquet"])
@pytest.mark.parametrize("content", ["parquet", "rubbish"])
def test_files_of_others(tmp_path: Path, name: str, content: str) -> None:
    if content == "parquet":
        pl.DataFrame({"a": [1]}).write_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"rubbish")
    before = (tmp_path / name).read_bytes()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"did not write \\({name}\\)"):
            check_output(tmp_path, IDENTITY, overwrite)
        with pytest.raises(OutputError, match="did not write"):
            WORLD.open(tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("lose", ["nothing", "manifest", "parts"])
def test_results_of_another_job(tmp_path: Path, lose: str) -> None:
    WORLD.run(tmp_path)
    if lose == "manifest":
        (tmp_path / "_run" / "manifest.json").unlink()
    if lose == "parts":
        for part in tmp_path.glob("*.parquet"):
            part.unlink()
        check_output(tmp_path, "other.parquet")
        return
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match=r"holds the results of another job.*--overwrite"):
        check_output(tmp_path, "other.parquet")
    with pytest.raises(OutputError, match="another job"):
        ResultStore.open(tmp_path, "other.parquet", WORLD.requests, WORLD.kept)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert check_output(tmp_path, "other.parquet", overwrite=True)
    assert not check_output(tmp_path, IDENTITY)
    assert not check_output(tmp_path, IDENTITY, overwrite=True)


def test_results_of_a_newer_version(tmp_path: Path) -> None:
    WORLD.run(tmp_path)
    newer = {**manifest(tmp_path), "format": 99, "batchllm": "9.0"}
    (tmp_path / "_run" / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(OutputError, match=r"newer batchllm \(9.0\)"):
        check_output(tmp_path, IDENTITY)


def of_another_job(out: Path, configuration: bytes = b"model") -> None:
    with ResultStore.open(
        out, "other.parquet", WORLD.requests, WORLD.kept, configuration=configuration, part_rows=10
    ) as store:
        WORLD.fill(store)
        store.finish()


def test_overwrite(tmp_path: Path) -> None:
    of_another_job(tmp_path)
    (tmp_path / "_run" / "superseded" / "00000").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "_run" / "metrics.json").write_text("{}")
    with WORLD.open(tmp_path, overwrite=True) as store:
        assert store.num_resumed == 0
        assert not list(tmp_path.glob("*.parquet"))
        assert not (tmp_path / "_run" / "metrics.json").exists()
        assert not (tmp_path / "_run" / "superseded").exists()
        WORLD.fill(store)
        store.finish()
    assert read(tmp_path) == WORLD.rows()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_goes_on_where_it_stopped(tmp_path: Path) -> None:
    of_another_job(tmp_path)
    with WORLD.open(tmp_path, overwrite=True) as store:
        WORLD.fill(store, 12)
    with WORLD.open(tmp_path, overwrite=True) as store:
        assert store.num_resumed == 12
        WORLD.fill(store)
        store.finish()
    assert read(tmp_path) == WORLD.rows()


def test_other_files_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    (tmp_path / "sub").mkdir()
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "sub" / "x.parquet")
    WORLD.run(tmp_path)
    assert read(tmp_path) == WORLD.rows()


def test_part_rows_have_a_bound(tmp_path: Path) -> None:
    for part_rows in (0, 1_000_001):
        with pytest.raises(JobError, match=r"output.part_rows: must be between 1 and 1,000,000"):
            WORLD.open(tmp_path / "out", part_rows=part_rows)
    assert not (tmp_path / "out").exists()


def test_names_of_parts_are_in_the_order_of_their_rows() -> None:
    for count in (99_999, 100_000, 100_002):
        assert sorted(final_parts(count, 1)) == list(final_parts(count, 1))
    assert list(final_parts(100_000, 1))[-1] == "part-99999.parquet", "as ever, where five digits will do"


@pytest.mark.parametrize("name", ["part-000003.parquet", "part-00004.parquet"])
def test_a_result_with_other_names_is_named_anew(tmp_path: Path, name: str) -> None:
    WORLD.run(tmp_path)
    (tmp_path / "part-00003.parquet").rename(tmp_path / name)
    assert WORLD.run(tmp_path).num_resumed == 35
    assert part_names(tmp_path) == [f"part-0000{i}.parquet" for i in range(4)]


# ---- rows in any order out of many chunks


def test_row_reader() -> None:
    rng = np.random.default_rng(0)
    values = pa.array([None if i % 7 == 0 else [str(i)] * (i % 3) for i in range(1000)])
    table = pa.table(
        {"x": pa.chunked_array([values.slice(i, 37) for i in range(0, 1000, 37)]), "i": range(1000)}
    )
    reader = RowReader(table)
    for rows in (
        rng.integers(0, 1000, 500),
        np.arange(1000),
        np.arange(1000)[::-1].copy(),
        np.array([5, 5, 5]),
    ):
        taken = reader.take(rows.astype(np.int64))
        assert taken.column("i").to_pylist() == rows.tolist()
        assert taken.column("x").to_pylist() == [values[int(i)].as_py() for i in rows]
