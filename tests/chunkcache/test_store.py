"""The store: what was put is found, by content and nothing else; limits, other processes, full disks."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.chunkcache import store as store_module
from batchllm.chunkcache import store_contents
from batchllm.chunkcache.catalog import ChunkName
from batchllm.chunkcache.chunk_file import ChunkFile
from batchllm.chunkcache.identity import chunk_context, model_identity, variant_key
from batchllm.chunkcache.store import ChunkStore
from batchllm.chunkcache.store_errors import StoreError, StoreWriteFailed
from batchllm.errors import OutputError
from tests.chunkcache.store_worlds import LAYERS, MODEL, make_chunk, tokens_of


def open_store(path: Path, **options: Any) -> ChunkStore:
    return ChunkStore(path, options.pop("model", MODEL), durable=False, **options)


def put(store: ChunkStore, number: int, **options: Any) -> bool:
    return store.put(*make_chunk(number, **options))


def found_file(store: ChunkStore, number: int, before: int = 0) -> ChunkFile | None:
    """The file of a chunk that was computed after `before` tokens."""
    for chunk in store.find(tokens_of(number)):
        if chunk.context_tokens == before:
            return store.open(chunk.name, tokens_of(number))
    return None


def assert_is(file: ChunkFile | None, number: int, **options: Any) -> None:
    assert file is not None
    header, layers = make_chunk(number, **options)
    assert file.header.tokens.tolist() == header.tokens.tolist()
    assert file.header.context == header.context
    assert (file.header.codec, file.header.dtype, file.header.model) == (
        header.codec,
        header.dtype,
        header.model,
    )
    np.testing.assert_array_equal(file.header.statistics.outside, header.statistics.outside)
    np.testing.assert_array_equal(file.header.statistics.sensitivity, header.statistics.sensitivity)
    np.testing.assert_array_equal(file.header.statistics.context_chunks, header.statistics.context_chunks)
    assert file.header.statistics.outside_mean == pytest.approx(0.25)
    assert file.num_layers == LAYERS
    for index in reversed(range(LAYERS)):  # any order
        assert file.layer_shape(index) == (2, 8, 8)
        np.testing.assert_array_equal(file.layer(index), layers[index].data)


def real_bytes(path: Path) -> int:
    """What the files of the store take, counted by blocks."""
    return sum(-(-f.stat().st_size // 4096) * 4096 for f in path.rglob("*") if f.is_file())


def test_what_is_put_is_found_by_this_and_every_later_process(tmp_path: Path):
    with open_store(tmp_path / "store", write=True) as store:
        for number in range(20):
            assert put(store, number)
            assert put(store, number, before=7)
            assert_is(found_file(store, number), number)
    again = open_store(tmp_path / "store")
    assert len(again) == 40 and not again.problems
    for number in range(20):
        assert len(again.find(tokens_of(number))) == 2
        assert_is(found_file(again, number), number)
        assert_is(found_file(again, number, before=7), number, before=7)
    assert again.find(tokens_of(20)) == []


def test_putting_twice_changes_nothing(tmp_path: Path):
    with open_store(tmp_path / "store", write=True) as store:
        put(store, 1)
        used = store.used_bytes()
        assert put(store, 1)
        assert store.used_bytes() == used and len(store) == 1


def test_variants_differ_by_context_and_codec(tmp_path: Path):
    with open_store(tmp_path / "store", write=True) as store:
        for before, codec in ((0, "bf16"), (0, "int8"), (5, "bf16")):
            put(store, 3, before=before, codec=codec)
        found = store.find(tokens_of(3))
    assert {(chunk.context_tokens, chunk.codec) for chunk in found} == {
        (0, b"bf16"),
        (0, b"int8"),
        (5, b"bf16"),
    }
    assert {chunk.context_chunks for chunk in found} == {0, 3}
    one, other = chunk_context(np.array([1, 2], np.int32), []), chunk_context(np.array([2, 1], np.int32), [])
    assert variant_key(one, "bf16") != variant_key(other, "bf16")


def test_a_changed_model_never_matches(tmp_path: Path):
    with open_store(tmp_path / "store", write=True) as store:
        put(store, 1)
    other = open_store(tmp_path / "store", model=b"a later fine-tune")
    assert len(other) == 1 and other.find(tokens_of(1)) == []


def test_the_identity_of_a_model_covers_every_byte_of_its_weights(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "transformers_version": "5.0"}')
    weights = tmp_path / "model.safetensors"
    data = bytearray(os.urandom(3_000_000))
    weights.write_bytes(data)
    identity = model_identity(str(tmp_path), "float32")
    assert len(identity) == 16
    (tmp_path / "config.json").write_text('{"transformers_version": "5.1", "hidden_size": 8}')
    assert model_identity(str(tmp_path), "float32") == identity
    assert model_identity(str(tmp_path), "bfloat16") != identity
    data[1_234_567] ^= 1
    weights.write_bytes(data)
    assert model_identity(str(tmp_path), "float32") != identity
    data[1_234_567] ^= 1
    weights.write_bytes(data)
    (tmp_path / "config.json").write_text('{"hidden_size": 9}')
    assert model_identity(str(tmp_path), "float32") != identity
    assert model_identity("org/name", "float32", "abc") != model_identity("org/name", "float32", "abd")


def test_tokens_are_compared_not_only_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with open_store(tmp_path / "store", write=True) as store:
        put(store, 1)
        monkeypatch.setattr(store_module, "chunk_key", lambda model, tokens: make_chunk(1)[0].key)
        (chunk,) = store.find(tokens_of(2))  # as if both had one hash
        assert store.open(chunk.name, tokens_of(2)) is None
        assert store.open(chunk.name, tokens_of(1)) is not None
        assert not store.problems


@settings(max_examples=25, deadline=None)
@given(
    limit=st.integers(30_000, 200_000),
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=60),
)
def test_the_limit_is_never_exceeded(
    limit: int, steps: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("limit") / "store"
    there: set[int] = set()
    with open_store(path, write=True, limit=limit) as store:
        for action, number in steps:
            if action:
                if put(store, number):
                    there.add(number)
            else:
                store.remove([ChunkName(make_chunk(number)[0].key, make_chunk(number)[0].variant)])
                there.discard(number)
            assert real_bytes(path) <= store.used_bytes() <= limit
        assert {number for number in range(31) if store.find(tokens_of(number))} == there
    assert {number for number in range(31) if found_file(open_store(path), number)} == there


def test_a_full_store_says_so_and_takes_again_after_a_removal(tmp_path: Path):
    with open_store(tmp_path / "store", write=True, limit=60_000) as store:
        taken = [number for number in range(20) if put(store, number)]
        assert 0 < len(taken) < 20 and not put(store, 30)
        assert not put(store, taken[0] + 40)
        freed = store.remove([store.find(tokens_of(taken[0]))[0].name])
        assert freed >= 4096
        assert put(store, taken[0] + 40)  # as large


def test_a_smaller_limit_removes_what_was_used_longest_ago(tmp_path: Path):
    path = tmp_path / "store"
    with open_store(path, write=True) as store:
        for number in range(10):
            put(store, number)
        for age, number in enumerate((3, 1, 4, 0, 5, 9, 2, 6, 8, 7)):
            file = store.folder.chunk(store.find(tokens_of(number))[0].name)
            os.utime(file, (1000 + age, 1000 + age))
        store.touch([store.find(tokens_of(3))[0].name])
        used = store.used_bytes()
    each = (used - 24 * 1024) // 10
    with open_store(path, write=True, limit=used - 4 * each + 1) as store:
        assert real_bytes(path) <= store.used_bytes() <= store.limit
        left = {number for number in range(10) if store.find(tokens_of(number))}
    assert left == {5, 9, 2, 6, 8, 7, 3} - ({5} if 5 not in left else set())
    assert {1, 4, 0}.isdisjoint(left) and 3 in left


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path: Path):
    path = tmp_path / "store"
    with open_store(path, write=True) as store:
        put(store, 1)
        with pytest.raises(OutputError, match="another process"):
            open_store(path, write=True)
        reader = open_store(path)
        assert_is(found_file(reader, 1), 1)
        put(store, 2)
        assert found_file(reader, 2) is None
        reader.refresh()
        assert_is(found_file(reader, 2), 2)
    open_store(path, write=True).close()


def test_a_reader_bears_removals(tmp_path: Path):
    path = tmp_path / "store"
    with open_store(path, write=True) as store:
        for number in range(3):
            put(store, number)
        reader = open_store(path)
        held = found_file(reader, 0)
        store.remove([chunk.name for chunk in store])
        assert_is(held, 0)  # what is open stays
        assert found_file(reader, 1) is None  # what is not is simply not there
        assert not reader.problems
        reader.refresh()
        assert len(reader) == 0
        put(store, 1)
        reader.refresh()
        assert_is(found_file(reader, 1), 1)


def test_an_index_of_removals_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_contents, "_FEW_ENTRIES", 10)
    path = tmp_path / "store"
    with open_store(path, write=True) as store:
        put(store, 0)
        reader = open_store(path)
        for number in range(1, 30):
            put(store, number)
            store.remove([store.find(tokens_of(number))[0].name])
        put(store, 50)
        assert (path / "index").stat().st_size < 24 * 128
        reader.refresh()
        assert len(reader) == 2
        assert_is(found_file(reader, 50), 50)


@pytest.mark.parametrize("moment", ["the chunk", "the rename", "the index"])
def test_a_full_disk_is_named_and_leaves_the_store_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    def half_a_chunk(path: str, *_: object) -> None:
        Path(path).write_bytes(b"BLLMCHNK and then")
        full()

    path = tmp_path / "store"
    with open_store(path, write=True) as store:
        put(store, 1)
        with monkeypatch.context() as patch:
            if moment == "the chunk":
                patch.setattr(store_module, "write_chunk_file", half_a_chunk)
            elif moment == "the rename":
                patch.setattr(store_module.os, "replace", full)
            else:
                patch.setattr(store_contents, "append_entries", full)
            with pytest.raises(StoreWriteFailed, match="No space left"):
                put(store, 2)
        assert not list(path.rglob("*.tmp"))
        assert_is(found_file(store, 1), 1)
        assert found_file(store, 2) is None
        assert put(store, 2)
        assert_is(found_file(store, 2), 2)
    again = open_store(path)
    assert len(again) == 2 and not again.problems


def test_folders_that_are_no_store(tmp_path: Path):
    with pytest.raises(StoreError, match="is not a chunk store"):
        open_store(tmp_path / "nothing")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "part-0.parquet").touch()
    with pytest.raises(StoreError, match="choose another folder"):
        open_store(tmp_path / "results", write=True)
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["part-0.parquet"]
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="choose another folder"):
        open_store(tmp_path / "file", write=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_may_not_be_written(tmp_path: Path):
    open_store(tmp_path / "store", write=True).close()
    (tmp_path / "store").chmod(0o500)
    with pytest.raises(StoreWriteFailed, match="Permission denied"):
        open_store(tmp_path / "store", write=True)
    (tmp_path / "store").chmod(0o700)
