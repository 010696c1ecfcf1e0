"""Stores, disks and rows that are not as they should be, through the command: named, computed instead or refused."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchllm.chunkcache import store as store_module
from batchllm.executor.device import Gpu, Machine
from tests.jobs import exit_code_of, read_metrics, read_output, save_model, texts
from tests.test_chunks_run import PASSAGES, ROWS, copied, plain_answers, precompute, rag_job, rag_rows, run
from tests.tiny_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with a job and its store. Not to be changed."""
    folder = tmp_path_factory.mktemp("rag")
    assert precompute(rag_job(folder, model_folder)) == 0
    return folder


def flip(file: Path, _: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-70] ^= 16
    file.write_bytes(raw)


def truncate(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[:-64])


def foreign(file: Path, _: Path) -> None:
    file.write_bytes(b"PAR1" + bytes(5000))


def another_chunk(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


@pytest.mark.parametrize("damage", [flip, truncate, foreign, another_chunk])
def test_a_damaged_file_is_named_computed_instead_and_mended(
    damage: Callable[[Path, Path], None], prepared: Path, tmp_path: Path, model_folder: Path, capfd: Any
):
    job = copied(prepared, tmp_path / "job")
    store = tmp_path / "job" / "store"
    files = sorted(store.glob("chunks/**/*.kv"))
    kept = [file.read_bytes() for file in files]
    for file, other in zip(files[:3], reversed(files)):
        damage(file, other)
    assert exit_code_of("run", job) == 0
    said = capfd.readouterr().err
    assert all(file.name in said for file in files[:3]) and "it is skipped and computed again" in said
    assert texts(tmp_path / "job" / "out") == plain_answers(tmp_path, model_folder)
    assert exit_code_of("chunks", "verify", store) == 3
    assert all(file.name in capfd.readouterr().err for file in files[:1])
    assert exit_code_of("chunks", "verify", store, "--remove") == 3
    assert precompute(job) == 0
    assert exit_code_of("chunks", "verify", store) == 0
    mended = {file.read_bytes()[-64:] for file in store.glob("chunks/**/*.kv")}
    assert len(mended) >= len({raw[-64:] for raw in kept})


def test_damage_is_never_silent_in_lossy_reuse(
    prepared: Path, tmp_path: Path, model_folder: Path, capfd: Any
):
    """Every file is damaged where only the checksum of a layer tells: answers are those of a full computation."""
    job = copied(prepared, tmp_path / "job")
    for file in (tmp_path / "job" / "store").glob("chunks/**/*.kv"):
        flip(file, file)
    assert exit_code_of("run", job, "--set", "chunks.reuse=naive") == 0
    assert texts(tmp_path / "job" / "out") == plain_answers(tmp_path, model_folder)
    assert "it is skipped and computed again" in capfd.readouterr().err


@pytest.mark.parametrize("index", [b"", b"not an index of ours" * 9, None])
def test_an_index_that_cannot_be_read_is_named_and_done_without(
    index: bytes | None, prepared: Path, tmp_path: Path, capfd: Any
):
    job = copied(prepared, tmp_path / "job")
    path = tmp_path / "job" / "store" / "index"
    path.write_bytes(path.read_bytes()[:-7] if index is None else index)
    assert exit_code_of("run", job) == 0
    assert read_metrics(tmp_path / "job" / "out")["chunks"]["exact_tokens"] > 100
    assert precompute(job) == 0
    assert exit_code_of("chunks", "verify", tmp_path / "job" / "store") == 0
    if index is not None:  # an index that ends early is what a crash leaves: one chunk less
        assert "index" in capfd.readouterr().err


def test_a_full_disk_ends_precompute_and_the_store_can_be_used_and_filled_up(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    job = rag_job(tmp_path, model_folder)
    written, write = 0, store_module.write_chunk_file

    def until_full(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written > 4:
            raise OSError(errno.ENOSPC, "no space")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_chunk_file", until_full)
        assert exit_code_of("precompute", job) == 1
    said = capfd.readouterr().err
    assert "No space left on device" in said and "run the same command again" in said
    assert exit_code_of("chunks", "verify", tmp_path / "store") == 0
    assert "4 chunks are good" in capfd.readouterr().out
    assert run(job) == 0
    assert read_metrics(tmp_path / "out")["chunks"]["exact_tokens"] > 0
    assert texts(tmp_path / "out") == plain_answers(tmp_path, model_folder)
    assert precompute(job) == 0
    assert "4 chunks are good" not in capfd.readouterr().out


def test_a_store_folder_that_holds_something_else_is_refused(tmp_path: Path, model_folder: Path, capfd: Any):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"\xff")
    job = rag_job(tmp_path, model_folder, store="photos")
    assert exit_code_of("precompute", job) == 2
    assert "choose another folder for chunks.store" in capfd.readouterr().err
    assert exit_code_of("run", job) == 2
    assert "is not a chunk store" in capfd.readouterr().err
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_no_list_empty_passages_and_passages_twice(tmp_path: Path, model_folder: Path, capfd: Any):
    """Whatever a row's list is like, its answer is the one of a job without chunks; and what is odd is said."""
    rows = [
        *rag_rows([[0, 1], [1, 0]]),
        {"id": "none", "passages": [], "question": "what?"},
        {"id": "empty", "passages": ["", PASSAGES[2], ""], "question": "what?"},
        {"id": "twice", "passages": [PASSAGES[0], PASSAGES[1], PASSAGES[0]], "question": "what?"},
    ]
    job = rag_job(tmp_path, model_folder, rows, contexts=2)
    assert precompute(job) == 0
    assert exit_code_of("run", job) == 0
    said = capfd.readouterr().err
    assert "1 rows have no chunks" in said and "1 rows hold a chunk more than once" in said
    assert texts(tmp_path / "out") == plain_answers(tmp_path, model_folder, rows)
    for reuse in ("naive", "repair"):
        assert run(job, "--overwrite", "--set", f"chunks.reuse={reuse}") == 0
        assert read_output(tmp_path / "out")["error"].null_count() == len(rows)


def test_a_job_without_any_chunk_runs(tmp_path: Path, model_folder: Path):
    rows = [{"id": f"r{n}", "passages": [], "question": f"what is {n}?"} for n in range(3)]
    rows[0]["passages"] = [""]
    job = rag_job(tmp_path, model_folder, rows)
    assert precompute(job) == 0
    assert run(job, "--set", "chunks.reuse=repair") == 0
    assert texts(tmp_path / "out") == plain_answers(tmp_path, model_folder, rows)


def test_a_store_of_another_model_and_format_can_hold_this_one_s_chunks_too(
    prepared: Path, tmp_path: Path, model_folder: Path
):
    """Precompute adds the chunks of the other format; then each finds its own and only those."""
    job = copied(prepared, tmp_path / "job")
    other = ("--set", "model.dtype=bfloat16")
    assert precompute(job, *other) == 0
    before = len(list((tmp_path / "job" / "store").glob("chunks/**/*.kv")))
    assert precompute(job, *other) == 0
    assert len(list((tmp_path / "job" / "store").glob("chunks/**/*.kv"))) == before
    assert run(job) == 0
    assert texts(tmp_path / "job" / "out") == plain_answers(tmp_path, model_folder)
    assert run(job, *other, "--overwrite") == 0
    assert read_metrics(tmp_path / "job" / "out")["chunks"]["exact_tokens"] > 100
    assert len(ROWS) == read_metrics(tmp_path / "job" / "out")["rows_ok"]


def test_tokens_that_the_model_does_not_know_cost_their_row(tmp_path: Path, capfd: Any):
    """A tokenizer with more tokens than the model has embeddings."""
    model = save_model(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<<new>>"])
    tokenizer.save_pretrained(model)
    rows = [*rag_rows([[0, 1]]), {"id": "new", "passages": ["a <<new>> word"], "question": "what?"}]
    job = rag_job(tmp_path, model, rows)
    assert exit_code_of("precompute", job) == 3
    assert "row 1: the prompt has the token id 262; the model knows 262 tokens" in capfd.readouterr().out
    assert run(job) == 3
    assert read_output(tmp_path / "out")["error"].null_count() == 1


GPU = Gpu("a GPU", True, 1 << 40, torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "machine", "sentence"),
    [
        (
            "cuda",
            Machine(None, "torch finds no GPU"),
            "engine.device: cuda cannot be used, for torch finds no GPU",
        ),
        ("cuda", Machine(GPU), "stored chunks are reused on the CPU only; set engine.device to cpu"),
        ("auto", Machine(GPU), "stored chunks are reused on the CPU only; set engine.device to cpu"),
    ],
)
def test_a_device_that_cannot_have_chunks_is_refused_by_both_commands(
    device: str,
    machine: Machine,
    sentence: str,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
):
    job = copied(prepared, tmp_path / "job")
    monkeypatch.setattr("batchllm.executor.device.this_machine", lambda: machine)
    for command in ("precompute", "run"):
        assert exit_code_of(command, job, "--set", f"engine.device={device}") == 2
        assert sentence in capfd.readouterr().err
