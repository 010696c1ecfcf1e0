"""Jobs with a `chunks` section through the command: precompute, then runs that reuse, and what can be wrong."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.jobs import exit_code_of, make_job, read_metrics, read_output, save_model, texts, write_rows

PASSAGES = [f"Passage {n}: the value of thing {n} is {n * 37 % 101}." for n in range(6)]
TEMPLATE = "Read this.\n{% for p in passages %}{{ p }}\n{% endfor %}Question: {{ question }}"


def rag_rows(orders: list[list[int]]) -> list[dict[str, Any]]:
    return [
        {"id": f"r{row}", "passages": [PASSAGES[n] for n in order], "question": f"what is {row}?"}
        for row, order in enumerate(orders)
    ]


ROWS = rag_rows([[0, 1], [1, 0], [2, 3, 0], [3, 2], [0, 1, 4], [4, 5], [5, 0]])


def rag_job(folder: Path, model: Path, rows: Any = None, **chunks: Any) -> Path:
    job = make_job(
        folder,
        model,
        ROWS if rows is None else rows,
        prompt={"text": TEMPLATE},
        chunks={"column": "passages", "store": "store", **chunks},
    )
    return job


def run(job: Path, *options: object) -> int:
    return exit_code_of("run", job, "--quiet", *options)


def precompute(job: Path, *options: object) -> int:
    return exit_code_of("precompute", job, "--quiet", *options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with a job and its store. Not to be changed."""
    folder = tmp_path_factory.mktemp("rag")
    job = rag_job(folder, model_folder)
    assert precompute(job) == 0
    return folder


def copied(prepared: Path, folder: Path) -> Path:
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    return folder / "job.yaml"


def plain_answers(folder: Path, model: Path, rows: Any = None) -> Mapping[tuple[str, int], str]:
    """Of the same job without a section chunks."""
    job = make_job(folder / "plain", model, ROWS if rows is None else rows, prompt={"text": TEMPLATE})
    assert run(job) == 0
    return texts(folder / "plain" / "out")


def test_exact_reuse_gives_the_answers_of_the_same_job_without_chunks(
    prepared: Path, tmp_path: Path, model_folder: Path
):
    job = copied(prepared, tmp_path / "job")
    assert run(job) == 0
    assert texts(tmp_path / "job" / "out") == plain_answers(tmp_path, model_folder)
    metrics = read_metrics(tmp_path / "job" / "out")
    plain = read_metrics(tmp_path / "plain" / "out")
    assert metrics["chunks"]["exact_tokens"] > 100 and metrics["chunks"]["repaired_tokens"] == 0
    assert metrics["prompt_tokens"] == plain["prompt_tokens"]
    assert metrics["prompt_tokens_computed"] < plain["prompt_tokens_computed"] / 2
    assert "quality" not in metrics["chunks"]


def test_off_computes_everything(prepared: Path, tmp_path: Path, model_folder: Path):
    job = copied(prepared, tmp_path / "job")
    assert run(job, "--set", "chunks.reuse=off") == 0
    assert texts(tmp_path / "job" / "out") == plain_answers(tmp_path, model_folder)
    assert read_metrics(tmp_path / "job" / "out")["chunks"] == {}


@pytest.mark.parametrize("reuse", ["naive", "repair"])
def test_lossy_reuse_reports_its_quality_on_a_sample(reuse: str, prepared: Path, tmp_path: Path):
    job = copied(prepared, tmp_path / "job")
    write_rows(tmp_path / "job" / "rows.parquet", rag_rows([[1, 2, 0], [5, 3], [2, 4, 1], [0, 5]]))
    assert run(job, "--set", f"chunks.reuse={reuse}") == 0
    figures = read_metrics(tmp_path / "job" / "out")["chunks"]
    assert figures["quality"]["answers"] == 4
    assert 0 <= figures["quality"]["token_agreement"] <= 1
    assert figures["placed_tokens"] > 100
    assert (figures["repaired_tokens"] > 0) == (reuse == "repair")


def test_a_target_is_reached_by_computing_more_again(prepared: Path, tmp_path: Path):
    job = copied(prepared, tmp_path / "job")
    write_rows(tmp_path / "job" / "rows.parquet", rag_rows([[1, 2, 0], [5, 3], [2, 4, 1], [0, 5]]))
    lossy = ("--set", "chunks.reuse=repair", "--set")
    assert run(job, *lossy, "chunks.target_quality=1.0") == 0
    figures = read_metrics(tmp_path / "job" / "out")["chunks"]
    assert figures["quality"]["exact_match"] == 1.0
    shares = [float(share) for share in figures["tried"]]
    assert shares == sorted(shares) and len(shares) >= 1
    assert run(job, *lossy, "chunks.target_quality=0.0", "--overwrite") == 0
    assert read_metrics(tmp_path / "job" / "out")["chunks"]["recompute"] == 0.05


def test_answers_of_lossy_reuse_are_not_taken_for_exact_ones(prepared: Path, tmp_path: Path):
    job = copied(prepared, tmp_path / "job")
    assert run(job, "--set", "chunks.reuse=naive") == 0
    assert run(job, "--overwrite") == 0
    assert read_metrics(tmp_path / "job" / "out")["rows_resumed"] == 0
    assert run(job) == 0
    assert read_metrics(tmp_path / "job" / "out")["rows_resumed"] == len(ROWS)


def test_answers_of_lossy_reuse_are_not_shared_by_jobs(prepared: Path, tmp_path: Path, capfd: Any):
    """What the store holds decides them, and it may hold something else for the next job."""
    cache = tmp_path / "cache"
    job = copied(prepared, tmp_path / "job")
    with_cache = ("--set", f"output.cache={cache}")
    assert exit_code_of("run", job, *with_cache, "--set", "chunks.reuse=naive") == 0
    assert "output.cache is not used" in capfd.readouterr().err
    assert not cache.exists()
    assert run(job, *with_cache, "--overwrite") == 0
    assert list(cache.glob("*.parquet"))
    # Elsewhere: in the same folder the answers of the first run, which were set aside, would be taken back.
    elsewhere = ("--set", "chunks.reuse=naive", "--set", "output.path=elsewhere")
    assert run(job, *with_cache, *elsewhere) == 0
    metrics = read_metrics(tmp_path / "job" / "elsewhere")
    assert metrics["chunks"]["placed_tokens"] > 100  # none came from the cache


def test_passages_that_may_be_reordered_share_exact_prefixes(tmp_path: Path, model_folder: Path):
    rows = rag_rows([[0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1], [3, 0, 1], [1, 3, 0]])
    free = {"text": TEMPLATE, "reorder": "passages"}
    computed = {}
    for name, prompt in (("given", {"text": TEMPLATE}), ("free", free)):
        chunks = {"column": "passages", "store": "store", "reuse": "repair"}
        job = make_job(tmp_path / name, model_folder, rows, prompt=prompt, chunks=chunks)
        assert precompute(job) == 0
        assert run(job) == 0
        computed[name] = read_metrics(tmp_path / name / "out")
    lossy = {
        name: found["chunks"]["placed_tokens"] - found["chunks"]["exact_tokens"]
        for name, found in computed.items()
    }
    assert lossy["free"] < lossy["given"]


def test_rows_without_chunks_and_with_one_twice_are_answered(tmp_path: Path, model_folder: Path):
    rows = [*rag_rows([[0, 1], [1, 0]]), {"id": "none", "passages": [], "question": "what?"}]
    rows.append({"id": "twice", "passages": [PASSAGES[0]] * 2, "question": "what?"})
    job = rag_job(tmp_path, model_folder, rows)
    assert precompute(job) == 0
    assert run(job) == 0
    assert texts(tmp_path / "out") == plain_answers(tmp_path, model_folder, rows)


def test_a_store_of_another_model_never_matches(prepared: Path, tmp_path: Path, capfd: Any):
    job = copied(prepared, tmp_path / "job")
    other = save_model(tmp_path / "other", seed=1)
    assert exit_code_of("run", job, "--set", f"model.path={other}", "--set", "chunks.reuse=naive") == 0
    assert read_metrics(tmp_path / "job" / "out")["chunks"]["placed_tokens"] == 0
    assert "chunks of other models or number formats and none of this one's" in capfd.readouterr().err


def test_a_store_of_another_number_format_never_matches(prepared: Path, tmp_path: Path, capfd: Any):
    job = copied(prepared, tmp_path / "job")
    assert exit_code_of("run", job, "--set", "model.dtype=bfloat16") == 0
    assert read_metrics(tmp_path / "job" / "out")["chunks"]["placed_tokens"] == 0
    assert "none of this one's" in capfd.readouterr().err


def test_damaged_chunks_are_named_and_computed_instead(
    prepared: Path, tmp_path: Path, model_folder: Path, capfd: Any
):
    job = copied(prepared, tmp_path / "job")
    for number, file in enumerate(sorted((tmp_path / "job" / "store").glob("chunks/**/*.kv"))):
        raw = bytearray(file.read_bytes())
        raw[-100] ^= 4
        file.write_bytes(raw if number % 2 else raw[:200])
    assert exit_code_of("run", job) == 0
    assert texts(tmp_path / "job" / "out") == plain_answers(tmp_path, model_folder)
    assert read_metrics(tmp_path / "job" / "out")["chunks"]["placed_tokens"] == 0
    assert "it is skipped and computed again" in capfd.readouterr().err


def test_a_chunk_longer_than_the_context_costs_its_row(tmp_path: Path, model_folder: Path):
    rows = [*rag_rows([[0, 1]]), {"id": "long", "passages": ["word " * 200], "question": "what?"}]
    job = rag_job(tmp_path, model_folder, rows)
    assert precompute(job) == 3
    assert run(job) == 3
    errors = dict(zip(read_output(tmp_path / "out")["id"], read_output(tmp_path / "out")["error"]))
    assert errors["r0"] is None and "at most 511" in errors["long"]


def test_the_limit_of_the_store_is_kept(tmp_path: Path, model_folder: Path, capfd: Any):
    job = rag_job(tmp_path, model_folder, store_limit="100KiB")
    assert exit_code_of("precompute", job) == 0
    assert "did not fit into chunks.store_limit" in capfd.readouterr().out
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "store").rglob("*") if file.is_file())
    assert used <= 100 * 1024
    assert run(job) == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"chunks": {"column": "passage", "store": "s"}}, "chunks.column: there is no column `passage`"),
        ({"chunks": {"column": "question", "store": "s"}}, "chunks are the elements of a list"),
        (
            {"chunks": {"column": "passages", "store": "s"}, "prompt": {"text": "{{ question }}"}},
            "no template uses `passages`",
        ),
        (
            {"chunks": {"column": "passages", "store": "s"}},
            "is not a chunk store; `batchllm precompute` makes",
        ),
        (
            {"chunks": {"column": "passages", "store": "s"}, "prompt": {"column": "question"}},
            "chunks need a template",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    sections: dict[str, Any], message: str, tmp_path: Path, model_folder: Path, capfd: Any
):
    job = make_job(tmp_path, model_folder, ROWS, **{"prompt": {"text": TEMPLATE}, **sections})
    assert run(job) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_precompute_needs_the_section(tmp_path: Path, model_folder: Path, capfd: Any):
    job = make_job(tmp_path, model_folder, ROWS, prompt={"text": TEMPLATE})
    assert precompute(job) == 2
    assert "precompute needs a section chunks" in capfd.readouterr().err


def test_the_resolved_job_has_the_section(prepared: Path, tmp_path: Path):
    job = copied(prepared, tmp_path / "job")
    assert run(job) == 0
    resolved = yaml.safe_load((tmp_path / "job" / "out" / "_run" / "job.yaml").read_text())
    assert resolved["chunks"]["reuse"] == "exact"
