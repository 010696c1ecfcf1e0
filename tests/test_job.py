from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from batchllm.core import SamplingParams
from batchllm.errors import JobError
from batchllm.job import GenerateSpec, InvalidParam, JobSpec, load_job, make_job, parse_bytes

SMALLEST: dict[str, Any] = {
    "model": {"path": "owner/model"},
    "input": {"path": "rows.parquet"},
    "prompt": {"text": "{{ question }}"},
    "output": {"path": "answers"},
}


def job_with(**sections: Any) -> dict[str, Any]:
    """The smallest job with sections merged in; a prompt replaces the other."""
    merged = dict(SMALLEST)
    for name, values in sections.items():
        is_merged = name != "prompt" and isinstance(values, dict)
        merged[name] = {**merged.get(name, {}), **values} if is_merged else values
    return merged


def error_of(mapping: dict[str, Any], base: Path = Path("/jobs")) -> str:
    with pytest.raises(JobError) as caught:
        make_job(mapping, base, "job.yaml")
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    job = make_job(SMALLEST, tmp_path)
    assert job.model.dtype == "auto"
    assert job.model.trust_remote_code is False
    assert (job.input.format, job.input.id, job.input.limit) == ("auto", None, None)
    assert job.generate == GenerateSpec(
        max_tokens=256,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        n=1,
        seed=0,
        stop=(),
        stop_token_ids=(),
    )
    assert (job.output.keep, job.output.part_rows, job.output.flush_seconds) == ((), 10_000, 10.0)
    engine = job.engine
    assert (engine.device, engine.kv_memory, engine.max_step_tokens, engine.order) == ("auto",) * 4
    assert (engine.workers, engine.min_shared_tokens) == (1, "auto")


def test_full_job_is_read_as_written(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        model: {path: owner/model, dtype: bfloat16, trust_remote_code: true}
        input: {path: "data/**/*.parquet", format: parquet, id: key, limit: 7}
        prompt:
          messages: [{role: system, content: be brief}, {role: user, content: "{{ q }}"}]
          template_args: {enable_thinking: no}
        generate: {max_tokens: {column: budget}, temperature: 1e-1, top_p: 0.5, top_k: 3, min_p: 0, n: 2, seed: 9,
                   stop: END, stop_token_ids: [1, 2], ignore_eos: true, logprobs: true}
        output: {path: out, keep: all, part_rows: 5, flush_seconds: 1}
        engine: {device: cpu, kv_memory: 1.5GiB, max_step_tokens: 64, order: tree, workers: 1, min_shared_tokens: 8}
        """,
    )
    job = load_job(path)
    assert job.input.path == str(tmp_path / "data/**/*.parquet")
    assert job.output.path == tmp_path / "out"
    assert job.generate.columns == {"max_tokens": "budget"}
    assert job.generate.params({"max_tokens": 11}) == SamplingParams(
        max_tokens=11, temperature=0.1, top_p=0.5, top_k=3, n=2, seed=9, stop=("END",), stop_token_ids=(1, 2),
        ignore_eos=True, logprobs=True,
    )  # fmt: skip
    assert job.output.keep == "all"
    assert job.engine.kv_memory == 3 * 2**29
    assert [message.role for message in job.prompt.messages or ()] == ["system", "user"]
    assert job.prompt.template_args == {"enable_thinking": False}


def test_job_cannot_be_changed(tmp_path: Path) -> None:
    job = make_job(SMALLEST, tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        job.engine.device = "cpu"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            job_with(generate={"temperatur": 1}),
            "generate.temperatur is not a known key; did you mean generate.temperature?",
        ),
        (job_with(modle={"path": "x"}), "modle is not a known key; did you mean model?"),
        (job_with(max_tokens=3), "max_tokens is not a known key; did you mean generate.max_tokens?"),
        (job_with(generate={"dtype": "auto"}), "generate.dtype is not a known key; did you mean model.dtype?"),
        (
            job_with(prompt={"messages": [{"rol": "user", "content": "x"}]}),
            "prompt.messages[0].rol is not a known key; did you mean prompt.messages[0].role?",
        ),
        (
            job_with(generate={"n": {"colum": "x"}}),
            "generate.n.colum is not a known key; did you mean generate.n.column?",
        ),
        (
            job_with(engine={"xyz": 1}),
            "engine.xyz is not a known key; the keys of engine are device, kv_memory, max_step_tokens, order, "
            "workers, min_shared_tokens",
        ),
        ({**SMALLEST, 3: 1}, "3 is not a known key; the keys of a job file are model, input, prompt, "
         "generate, score, output, engine, plan, chunks"),
        (job_with(output=None), "output is missing"),
        (job_with(input={"path": None}), "input.path is missing"),
        (job_with(generate=[1]), "generate must be a mapping, found a list"),
        (job_with(generate={"n": "lots"}), "generate.n must be a whole number, found the text `lots`"),
        (job_with(generate={"max_tokens": 0}), "generate.max_tokens must be at least 1, found the number 0"),
        (job_with(generate={"max_tokens": True}), "generate.max_tokens must be a whole number, found true"),
        (job_with(generate={"temperature": -1}), "generate.temperature must be at least 0, found the number -1"),
        (
            job_with(generate={"temperature": float("nan")}),
            "generate.temperature must be a finite number, found the number nan",
        ),
        (job_with(generate={"top_p": 0}), "generate.top_p must be greater than 0, found the number 0"),
        (job_with(generate={"top_p": 1.5}), "generate.top_p must be at most 1, found the number 1.5"),
        (
            job_with(output={"path": "out", "part_rows": 1_000_001}),
            "output.part_rows must be at most 1,000,000, found the number 1000001",
        ),
        (job_with(generate={"seed": -1}), "generate.seed must be at least 0, found the number -1"),
        (job_with(generate={"stop": [""]}), "generate.stop must not contain an empty text"),
        (job_with(generate={"stop": 3}), "generate.stop must be text or a list of texts, found the number 3"),
        (
            job_with(generate={"stop_token_ids": [1, "a"]}),
            "generate.stop_token_ids[1] must be a whole number, found the text `a`",
        ),
        (job_with(generate={"logprobs": 5}), "generate.logprobs must be true or false, found the number 5"),
        (job_with(generate={"n": {"column": 3}}), "generate.n.column must be text, found the number 3"),
        (
            job_with(prompt={"text": "a", "column": "b"}),
            "prompt must have exactly one of text, messages and column, found text and column",
        ),
        (
            job_with(prompt={}),
            "prompt must have exactly one of text, messages and column, found none of them",
        ),
        (job_with(prompt={"text": ""}), "prompt.text must not be empty"),
        (job_with(prompt={"messages": []}), "prompt.messages must not be empty"),
        (
            job_with(prompt={"text": "a", "template_args": {"x": 1}}),
            "prompt has template_args, which are for messages or column and do nothing for text",
        ),
        (job_with(input={"limit": "x"}), "input.limit must be a whole number, found the text `x`"),
        (job_with(input={"format": "xml"}), "input.format must be auto, parquet, jsonl or csv, found the text `xml`"),
        (job_with(output={"path": 3}), "output.path must be text, found the number 3"),
        (
            job_with(output={"path": "s3://bucket/out"}),
            "output.path must be a local folder; copy the results to a URL when the job is done",
        ),
        (job_with(output={"keep": "x"}), "output.keep must be a list of columns, or all, found the text `x`"),
        (job_with(engine={"device": "gpu"}), "engine.device must be auto, cpu or cuda, found the text `gpu`"),
        (
            job_with(engine={"workers": 2}),
            "engine.workers must be 1, because this version runs one worker, found the number 2",
        ),
        (
            job_with(engine={"kv_memory": "4 gigs"}),
            "engine.kv_memory must be a size such as 4GiB or a number of bytes, found the text `4 gigs`",
        ),
        (
            job_with(engine={"max_step_tokens": 0}),
            "engine.max_step_tokens must be at least 1, found the number 0",
        ),
        (
            job_with(engine={"min_shared_tokens": "x"}),
            "engine.min_shared_tokens must be a whole number or auto, found the text `x`",
        ),
        (
            job_with(score={"continuations": ["a"]}),
            "score.continuations is not a known key; did you mean score.continuation?",
        ),
        (job_with(chunks={"column": "c"}), "chunks.store is missing"),
        (
            job_with(chunks={"column": "c", "store": "s", "reuse": "all"}),
            "chunks.reuse must be off, exact, naive or repair, found the text `all`",
        ),
        (
            job_with(chunks={"column": "c", "store": "s", "recompute": 0.1}),
            "chunks has recompute, which is for reuse: repair; found reuse: exact",
        ),
        (
            job_with(
                chunks={
                    "column": "c",
                    "store": "s",
                    "reuse": "repair",
                    "recompute": 0.1,
                    "target_quality": 0.99,
                }
            ),
            "chunks has recompute and target_quality: give one, the other follows from it",
        ),
        (job_with(model={"path": "./missing"}), "model.path names no folder: `/jobs/missing` does not exist"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(mapping: dict[str, Any], message: str) -> None:
    assert error_of(mapping) == f"job.yaml: {message}"


def test_null_counts_as_not_given(tmp_path: Path) -> None:
    job = make_job(
        job_with(generate=None, engine={"kv_memory": None}, input={"limit": None}, score=None), tmp_path
    )
    assert job == make_job(SMALLEST, tmp_path)
    assert "generate.nope" in error_of(job_with(generate={"nope": None}))


# Paths


def test_paths_start_at_the_folder_of_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "jobs"
    (folder / "tiny").mkdir(parents=True)
    write(folder, yaml.safe_dump(job_with(model={"path": "tiny"}, output={"path": "../out"})))
    monkeypatch.chdir(tmp_path)
    job = load_job("jobs/job.yaml")
    assert job.model.path == str(folder / "tiny")
    assert job.input.path == str(folder / "rows.parquet")
    assert job.output.path == tmp_path / "out"


def test_a_job_from_python(tmp_path: Path) -> None:
    sections = job_with(model={"path": tmp_path}, input={"path": tmp_path / "rows.csv"}, generate={"n": 2})
    job = make_job(sections, ".", overrides={"generate.seed": 3, "output.path": tmp_path / "x"})
    assert (job.model.path, job.input.path) == (str(tmp_path), str(tmp_path / "rows.csv"))
    assert (job.generate.n, job.generate.seed, job.output.path) == (2, 3, tmp_path / "x")
    assert sections["generate"] == {"n": 2}
    with pytest.raises(JobError, match=r"^--set generate\.n: generate\.n must be at least 1"):
        make_job(sections, ".", overrides=["generate.n=0"])


def test_urls_and_hub_ids_stay_as_they_are(tmp_path: Path) -> None:
    for url in ("s3://bucket/a b/*.parquet", "file:///data/rows.csv"):
        assert make_job(job_with(input={"path": url}), tmp_path).input.path == url
    for name in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert make_job(job_with(model={"path": name}), tmp_path).model.path == name


def test_a_path_that_cannot_be_a_hub_id_must_exist(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for path in ("a/b/c", "../x", "~/no-such-model-here"):
        assert "names no folder" in error_of(job_with(model={"path": path}), tmp_path)
    assert "give the folder it is in" in error_of(job_with(model={"path": "model.gguf"}), tmp_path)


def test_output_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "answers").touch()
    assert "is a file" in error_of(SMALLEST, tmp_path)


# Overrides


def test_history_is_an_existing_folder_beside_the_job(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    job = make_job(job_with(plan={"history": "old"}), tmp_path)
    assert job.plan.history == tmp_path / "old"
    assert make_job(job.resolved(), tmp_path / "elsewhere") == job
    message = f"must be the output folder of an earlier run, and there is no folder `{tmp_path}/gone`"
    with pytest.raises(JobError, match=re.escape(f"job: plan.history {message}")):
        make_job(job_with(plan={"history": "gone"}), tmp_path)
    assert make_job(SMALLEST, tmp_path).plan.history is None


def test_sample_rows_is_a_number_of_rows(tmp_path: Path) -> None:
    assert make_job(SMALLEST, tmp_path).plan.sample_rows is None
    assert make_job(job_with(plan={"sample_rows": 200}), tmp_path).plan.sample_rows == 200
    for value in (0, "many", 0.1, True):
        with pytest.raises(JobError, match=r"^job: plan\.sample_rows must be "):
            make_job(job_with(plan={"sample_rows": value}), tmp_path)


def test_overrides_are_yaml_values_and_the_last_one_counts(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(job_with(generate={"seed": 5, "max_tokens": 9})))
    overrides = [
        "engine.kv_memory=1GiB", "generate.stop=[a, b]", "generate.n=2", "generate.n=3", "generate.seed=null",
        "input.limit=10", "output.keep=all", "generate.temperature={column: t}",
    ]  # fmt: skip
    job = load_job(path, overrides)
    assert job.engine.kv_memory == 2**30
    assert job.generate.stop == ("a", "b")
    assert (job.generate.n, job.generate.seed, job.generate.max_tokens) == (3, 0, 9)
    assert job.input.limit == 10
    assert job.output.keep == "all"
    assert job.generate.columns == {"temperature": "t"}


@pytest.mark.parametrize("text", ["Q: {{ q }}", "{{ q }} # 1", "2024", "[{{ q }}]", "a=b", "yes"])
def test_text_is_overridden_as_it_is_typed(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    assert load_job(path, [f"prompt.text={text}"]).prompt.text == text


def test_text_override_in_quotes_and_null(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(job_with(input={"id": "key"})))
    assert load_job(path, [r'prompt.text="a\nb"']).prompt.text == "a\nb"
    assert load_job(path, ["input.id=null"]).input.id is None
    job = load_job(path, ["prompt.text=null", "prompt.column=p"])
    assert (job.prompt.text, job.prompt.column) == (None, "p")


def test_overrides_as_a_mapping_of_plain_values(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    job = load_job(path, {"generate.max_tokens": 3, "prompt": {"column": "q"}})
    assert job.generate.max_tokens == 3
    assert job.prompt.column == "q"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate.temperatur=1", "--set generate.temperatur: generate.temperatur is not a known key; did you mean "
         "generate.temperature?"),
        ("engine.workers=4", "--set engine.workers: engine.workers must be 1, because this version runs one worker, "
         "found the number 4"),
        ("generate={n: 0}", "--set generate: generate.n must be at least 1, found the number 0"),
        ("score.x=1", "--set score.x: score.x is not a known key; the keys of score are continuation, choices, "
         "rolling, token_logprobs"),
        ("model.path=./no", "--set model.path: model.path names no folder: "),
        ("limit", "--set limit: write it as KEY=VALUE, for example engine.kv_memory=1GiB"),
        ("a..b=1", "--set a..b=1: write it as KEY=VALUE, for example engine.kv_memory=1GiB"),
        ("model.path.x=1", "--set model.path.x: model.path is not a mapping"),
        ("generate.stop=[a", "--set generate.stop=[a, line 1: "),
    ],
)  # fmt: skip
def test_a_wrong_override_is_blamed_itself(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, yaml.safe_dump(SMALLEST))
    with pytest.raises(JobError) as caught:
        load_job(path, [override])
    assert str(caught.value).startswith(message)


# Files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: x}\nmodel: {path: y}\n", ", line 2: the key `model` is given twice"),
        ("model:\n  path: x\n  path: y\n", ", line 3: the key `path` is given twice"),
        ("model: {path: x\ninput: 3\n", ", line 2: "),
        (
            "prompt:\n  text: {{ q }}\n",
            ", line 2: a key must be text (a template that begins with {{ must be",
        ),
        ("a: *b\n", ", line 1: found undefined alias 'b'"),
        ("a: b\n\x07: c\n", ", line 2: the character '\\x07' is not allowed"),
        ("", ": the job file is empty"),
        ("- a\n", ": a job file must be a mapping, found a list"),
        ("a: !!python/object:os.system x\n", ", line 1: could not determine a constructor"),
    ],
)
def test_yaml_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_unreadable_job_files(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no such job file"):
        load_job(tmp_path / "nope.yaml")
    with pytest.raises(JobError, match="cannot be read"):
        load_job(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(JobError, match="not UTF-8"):
        load_job(tmp_path / "latin.yaml")


def test_merge_keys_are_allowed(tmp_path: Path) -> None:
    text = "generate: &base {n: 2, seed: 1}\n" + yaml.safe_dump(SMALLEST)
    assert load_job(write(tmp_path, text)).generate.n == 2
    extended = text.replace("{n: 2", "{<<: {n: 3, top_k: 4}, n: 2")
    job = load_job(write(tmp_path, extended))
    assert (job.generate.n, job.generate.top_k) == (2, 4)


def test_resolved_job_is_yaml_that_gives_the_same_job(tmp_path: Path) -> None:
    job = make_job(
        job_with(
            prompt={"messages": [{"role": "user", "content": "{{ q }}"}], "template_args": {"tools": None}},
            generate={"n": {"column": "k"}, "stop": ["a"]},
            output={"keep": ["a", "b"]},
            engine={"kv_memory": "2GiB"},
        ),
        tmp_path,
    )
    again = yaml.safe_load(yaml.safe_dump(job.resolved()))
    assert make_job(again, "/somewhere/else") == job
    assert again["output"]["path"] == str(tmp_path / "answers")
    assert again["prompt"]["template_args"] == {"tools": None}


# Values


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("1g", 1 << 30), ("1GB", 10**9), ("1.5k", 1536), ("10b", 10),
     (123, 123), ("123", 123), ("2TiB", 2 << 40)],
)  # fmt: skip
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XB", "0", "1e9", True])
def test_not_sizes(text: str) -> None:
    with pytest.raises(ValueError):
        parse_bytes(text)


def test_params_of_a_row_are_checked_like_the_job(tmp_path: Path) -> None:
    generate = make_job(job_with(generate={"top_p": {"column": "p"}, "seed": 4}), tmp_path).generate
    assert generate.params({"top_p": 0.25}) == SamplingParams(max_tokens=256, top_p=0.25, seed=4)
    with pytest.raises(InvalidParam) as caught:
        generate.params({"top_p": 2})
    assert (caught.value.parameter, caught.value.reason) == ("top_p", "must be at most 1, found the number 2")
    with pytest.raises(InvalidParam, match="top_p must be a value, found a mapping"):
        generate.params({"top_p": {"column": "p"}})


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
       st.sampled_from(["model", "input", "prompt", "generate", "output", "engine"]), st.text())  # fmt: skip
def test_nothing_but_a_job_error_comes_of_nonsense(value: Any, section: str, key: str) -> None:
    fields = list(JobSpec.model_fields[section].annotation.model_fields)  # type: ignore[union-attr]
    field = fields[len(key) % len(fields)]
    for wrong in ({key: value}, {field: value}):
        with contextlib.suppress(JobError):  # any other exception is a fault of ours
            make_job(job_with(**{section: wrong}), "/jobs")
