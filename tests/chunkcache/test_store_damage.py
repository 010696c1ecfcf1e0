"""Damaged files and killed processes: seen, named in one sentence, and nothing else is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.chunkcache.chunk_file import _FIXED, ChunkFile, DamagedChunk, check_whole_file, write_chunk_file
from batchllm.chunkcache.store import ChunkStore
from tests.chunkcache.store_worlds import LAYERS, MODEL, make_chunk, tokens_of
from tests.chunkcache.test_store import assert_is, found_file, open_store, put

ROOT = Path(__file__).resolve().parents[2]


def read_all(store: ChunkStore, number: int) -> bool:
    """As a run does: a layer that turns out to be damaged makes the chunk one that is not there."""
    file = found_file(store, number)
    if file is None:
        return False
    header, layers = make_chunk(number)
    try:
        for index in range(LAYERS):
            np.testing.assert_array_equal(file.layer(index), layers[index].data)
    except DamagedChunk as damage:
        store.report(store.find(tokens_of(number))[0].name, str(damage))
        return False
    assert file.header.tokens.tolist() == header.tokens.tolist()
    return True


def chunk_path(store: ChunkStore, number: int) -> Path:
    return Path(store.folder.chunk(store.find(tokens_of(number))[0].name))


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("chunk") / "chunk.kv"
    write_chunk_file(str(path), *make_chunk(11, before=4), durable=True)
    assert check_whole_file(str(path)).tokens.tolist() == tokens_of(11).tolist()
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_bit_and_any_length_is_noticed(
    whole_file: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    damaged = bytearray(whole_file)
    padding = padding_of(whole_file)
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(damaged) - 1).filter(lambda at: at not in padding))
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        damaged = damaged[: data.draw(st.integers(0, len(damaged) - 1))]
    path = tmp_path_factory.getbasetemp() / "damaged.kv"
    path.write_bytes(damaged)
    with pytest.raises(DamagedChunk, match=r"damaged\.kv: "):
        check_whole_file(str(path))


def padding_of(raw: bytes) -> set[int]:
    """Places between the parts, which nobody reads."""
    header, layers = make_chunk(11, before=4)
    first = len(raw) - LAYERS * -(-layers[0].data.nbytes // 64) * 64
    used = set()
    for index, layer in enumerate(layers):
        begin = first + index * -(-layer.data.nbytes // 64) * 64
        used |= set(range(begin, begin + layer.data.nbytes))
    arrays = len(header.tokens) * 12 + len(header.context.chunks) * 20 + LAYERS * 32 + 8
    return set(range(len(raw))) - used - set(range(_FIXED.size + arrays))


@pytest.mark.parametrize("damage", ["flip header", "flip layer", "truncate", "empty", "foreign", "swap"])
def test_a_damaged_chunk_is_skipped_named_and_stored_again(tmp_path: Path, damage: str):
    path = tmp_path / "store"
    with open_store(path, write=True) as store:
        for number in range(4):
            put(store, number)
        victim = chunk_path(store, 2)
        raw = bytearray(victim.read_bytes())
        if damage == "flip header":
            raw[130] ^= 4
        elif damage == "flip layer":
            raw[-100] ^= 4
        elif damage == "truncate":
            raw = raw[:-64]
        elif damage == "empty":
            raw = bytearray()
        elif damage == "foreign":
            raw = bytearray(b"something else entirely" * 100)
        else:
            raw = bytearray(chunk_path(store, 3).read_bytes())
        victim.write_bytes(raw)
        assert [read_all(store, number) for number in range(4)] == [True, True, False, True]
        (problem,) = store.problems
        assert victim.name in problem and problem.endswith("it is skipped and computed again")
        assert put(store, 2)
        assert read_all(store, 2)
    assert all(read_all(open_store(path), number) for number in range(4))


def test_damage_to_the_index(tmp_path: Path):
    path = tmp_path / "store"
    with open_store(path, write=True) as store:
        for number in range(6):
            put(store, number)
    index = (path / "index").read_bytes()

    def numbers(store: ChunkStore) -> list[int]:
        return [number for number in range(7) if read_all(store, number)]

    for damaged in (b"", b"nonsense" * 50, flipped(index, len(index) // 2), flipped(index, 3)):
        (path / "index").write_bytes(damaged)
        reader = open_store(path)  # reads the chunk files instead
        assert numbers(reader) == list(range(6)) and len(reader.problems) == 1
        with open_store(path, write=True) as store:  # makes the index anew
            assert numbers(store) == list(range(6))
        assert not open_store(path).problems
    (path / "index").unlink()
    with open_store(path, write=True) as store:
        assert numbers(store) == list(range(6))
    # A last entry that was cut off is none.
    (path / "index").write_bytes(index[:-30])
    reader = open_store(path)
    assert numbers(reader) == list(range(5)) and not reader.problems
    with open_store(path, write=True) as store:
        assert put(store, 5) and put(store, 6)
    assert numbers(open_store(path)) == list(range(7))


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :]


@pytest.mark.parametrize("stop", ["before-rename", "before-index", "in-index", "before-unlink"])
def test_a_process_killed_at_the_worst_moment_loses_at_most_one_chunk(tmp_path: Path, stop: str):
    path = tmp_path / "store"
    stored = run_until_killed(path, stop)
    assert stored == list(range(5))
    assert (path / "unclean").exists()
    reader = open_store(path)
    gone = {0} if stop == "before-unlink" else set()
    assert [number for number in range(6) if read_all(reader, number)] == sorted(set(range(5)) - gone)
    assert not reader.problems
    with open_store(path, write=True) as store:
        assert not list(path.rglob("*.tmp"))
        assert all(read_all(store, number) for number in range(1, 5))
        there = len(store)
        # Written wholly before the kill: taken in again.
        assert read_all(store, 5) == (stop in ("before-index", "in-index"))
        assert put(store, 0) and put(store, 5)
        assert len(store) == 6
        assert there >= 5
    assert not (path / "unclean").exists()
    assert all(read_all(open_store(path), number) for number in range(6))


def test_processes_killed_at_any_moment(tmp_path: Path):
    path = tmp_path / "store"
    stored = 0
    for turn in range(4):
        stored += len(run_until_killed(path, after=0.03 * turn))
        reader = open_store(path)
        assert len(reader) >= stored
        assert all(read_all(reader, number) for number in range(stored)) and not reader.problems
    with open_store(path, write=True) as store:
        assert stored <= len(store) <= stored + 4
        assert not list(path.rglob("*.tmp"))
        bad: list[str] = []
        assert store.check(lambda name, problem: bad.append(problem)) == len(store) and not bad


def run_until_killed(path: Path, stop: str = "", after: float | None = None) -> list[int]:
    """The numbers of the chunks that were stored, as the process said before it was killed."""
    command = [sys.executable, "-m", "tests.chunkcache.store_worlds", str(path), stop]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        if after is not None:
            first = process.stdout.readline()
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
        else:
            first = ""
        said = first + process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    return [int(line) for line in said.split("\n")[:-1]]


def test_copies_and_strangers_in_the_folder(tmp_path: Path):
    """Files that are not chunks stay and do no harm; a chunk file under another's name is not believed."""
    path = tmp_path / "store"
    with open_store(path, write=True) as store:
        put(store, 1)
        put(store, 2)
        one, two = chunk_path(store, 1), chunk_path(store, 2)
        (one.parent / "README").write_text("hello")
        shutil.copy(one, two)
    (path / "index").unlink()
    with open_store(path, write=True) as store:
        assert len(store) == 1
        assert_is(found_file(store, 1), 1)
        assert found_file(store, 2) is None
    assert (one.parent / "README").exists()


def test_a_file_of_a_later_format_is_refused(tmp_path: Path, whole_file: bytes):
    (tmp_path / "later.kv").write_bytes(whole_file[:8] + b"\x63" + whole_file[9:])
    with pytest.raises(DamagedChunk, match="has format 99"):
        ChunkFile(str(tmp_path / "later.kv"))


def test_the_model_of_a_store_is_part_of_every_key(tmp_path: Path):
    header, _ = make_chunk(1)
    other, _ = make_chunk(1, model=b"another model..."[:16])
    assert header.key != other.key and other.model != MODEL
