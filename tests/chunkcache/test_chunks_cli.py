"""`batchllm chunks ls | verify | prune`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.chunkcache.store_worlds import MODEL, tokens_of
from tests.chunkcache.test_store import open_store, put
from tests.jobs import exit_code_of


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    with open_store(path, write=True) as made:
        for number in range(5):
            put(made, number)
        put(made, 0, before=9, codec="int8")
        made.folder.note_model(MODEL, {"path": "models/small", "dtype": "float32"})
    with open_store(path, write=True, model=b"a model of before"[:16]) as made:
        put(made, 0, model=b"a model of before"[:16])
    return path


def test_ls(store: Path, capsys: pytest.CaptureFixture[str]):
    assert exit_code_of("chunks", "ls", store) == 0
    said = capsys.readouterr().out
    assert "models/small (float32), 5 chunks in 6 variants" in said
    assert "bf16, int8" in said and "7 stored chunks" in said
    assert exit_code_of("chunks", "ls", store, "--json", "--all") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 7
    assert {row["context_tokens"] for row in rows} == {0, 9}
    assert exit_code_of("chunks", "ls", store, "--all") == 0
    assert "after 9 tokens with 3 chunks" in capsys.readouterr().out


def test_verify_names_and_removes_what_is_damaged(store: Path, capsys: pytest.CaptureFixture[str]):
    assert exit_code_of("chunks", "verify", store) == 0
    assert "7 chunks are good" in capsys.readouterr().out
    files = sorted((store / "chunks").rglob("*.kv"))
    files[0].write_bytes(files[0].read_bytes()[:-64])
    files[1].unlink()
    assert exit_code_of("chunks", "verify", store) == 3
    said = capsys.readouterr()
    assert files[0].name in said.err and f"{files[1].name}: is missing" in said.err
    assert "5 chunks are good, 2 damaged" in said.out
    assert exit_code_of("chunks", "verify", store, "--remove") == 3
    capsys.readouterr()
    assert exit_code_of("chunks", "verify", store) == 0
    assert "5 chunks are good\n" in capsys.readouterr().out


def test_prune(store: Path, capsys: pytest.CaptureFixture[str]):
    assert exit_code_of("chunks", "prune", store) == 2
    assert "say what to remove" in capsys.readouterr().err
    assert exit_code_of("chunks", "prune", store, "--limit", "much") == 2
    capsys.readouterr()
    assert (
        exit_code_of("chunks", "prune", store, "--model", b"a model of before"[:16].hex(), "--dry-run") == 0
    )
    assert "would remove 1 chunks" in capsys.readouterr().out
    assert len(open_store(store)) == 7
    assert exit_code_of("chunks", "prune", store, "--model", b"a model of before"[:16].hex()) == 0
    assert len(open_store(store)) == 6
    old = open_store(store)
    long_ago = time.time() - 10 * 86_400
    for number in (1, 2):
        os.utime(old.folder.chunk(old.find(tokens_of(number))[0].name), (long_ago, long_ago))
    assert exit_code_of("chunks", "prune", store, "--unused-for", "5") == 0
    left = open_store(store)
    assert [number for number in range(5) if left.find(tokens_of(number))] == [0, 3, 4]
    limit = left.used_bytes() - 1
    assert exit_code_of("chunks", "prune", store, "--limit", limit, "--dry-run") == 0
    assert len(open_store(store)) == 4
    assert exit_code_of("chunks", "prune", store, "--limit", limit) == 0
    assert len(open_store(store)) == 3 and open_store(store).used_bytes() <= limit


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", ""], "--model: must not be empty"),
        (["--model", "00ff"], "00ff: no model has this id"),
        (["--model", "61"], "61: the ids of 2 models begin with it; give more of one"),
        (["--unused-for", "-1"], "-1.0 is not in the range x>=0"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_nothing_is_removed_by_mistake(
    options: list[str], sentence: str, more: list[str], store: Path, capsys: pytest.CaptureFixture[str]
):
    other = b"a model like that one"[:16]
    with open_store(store, write=True, model=other) as made:
        put(made, 0, model=other)
    assert exit_code_of("chunks", "prune", store, *options, *more) == 2
    assert sentence in capsys.readouterr().err
    assert len(open_store(store)) == 8


def test_folders_that_are_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in (["ls"], ["verify"], ["verify", "--remove"], ["prune", "--limit", "1MiB"]):
        assert exit_code_of("chunks", *command, tmp_path / "nothing") == 2
        assert "is not a chunk store" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


def test_a_store_that_is_being_written(store: Path, capsys: pytest.CaptureFixture[str]):
    with open_store(store, write=True):
        assert exit_code_of("chunks", "ls", store) == 0
        assert exit_code_of("chunks", "prune", store, "--limit", "1MiB") == 2
        assert "another process" in capsys.readouterr().err
