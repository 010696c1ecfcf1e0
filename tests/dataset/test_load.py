from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_tokenizers import BOS, PythonTokenizer, byte_tokenizer, phi_tokenizer

from batchllm.core import PromptTable, SamplingParams
from batchllm.dataset.load import LoadedRows, load_rows, prompts_from_list, validate_columns
from batchllm.dataset.reader import open_input
from batchllm.errors import JobError, ModelError
from batchllm.job import JobSpec, make_job

ROWS: dict[str, Any] = {
    "key": ["a", "b", None, "d", "e"],
    "q": ["one", "two", "three", None, ""],
    "n": [1, 2, 3, 4, 5],
}


def job_over(folder: Path, columns: dict[str, Any], **sections: Any) -> JobSpec:
    """A job whose input is a Parquet file with these columns."""
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return job_on(folder / "rows.parquet", **sections)


def job_on(path: Path, **sections: Any) -> JobSpec:
    mapping = {
        "model": {"path": "owner/model"},
        "prompt": {"text": "{{ q }}"},
        **sections,
        "input": {"path": str(path), **sections.get("input", {})},
        "output": {"path": "out", **sections.get("output", {})},
    }
    return make_job(mapping, path.parent, "job.yaml")


def load(job: JobSpec, tokenizer: Any = None, progress: Any = None) -> LoadedRows:
    work_dir = job.output.path.parent / "work"
    work_dir.mkdir(exist_ok=True)
    return load_rows(job, open_input(job.input), tokenizer or byte_tokenizer(), work_dir, progress)


def ids_of(prompts: PromptTable) -> list[list[int]]:
    return [prompts.tokens[begin:end].tolist() for begin, end in pairwise(prompts.offsets)]


def texts_of(prompts: PromptTable) -> list[str]:
    return byte_tokenizer().batch_decode(ids_of(prompts))


def test_rows_become_tokens_kept_columns_and_faults(tmp_path: Path) -> None:
    job = job_over(tmp_path, ROWS, input={"id": "key"}, output={"keep": ["n", "key"]})
    rows = load(job)
    assert texts_of(rows.prompts) == ["<s>one", "<s>two", "", "", ""]
    assert rows.prompts.faults == {
        2: "column `key` is null",
        3: "column `q` is null",
        4: "the prompt is empty",
    }
    assert (rows.prompts.tokens.dtype, rows.prompts.offsets.dtype) == (np.int32, np.int64)
    assert rows.prompts.params == (SamplingParams(max_tokens=256),)
    assert rows.prompts.params_of.tolist() == [0] * 5
    assert rows.kept.to_pydict() == {"key": ROWS["key"], "n": ROWS["n"]}  # the id comes first
    assert rows.ids is not None
    assert rows.ids.to_pylist() == ROWS["key"]


@pytest.mark.parametrize(
    ("keep", "names"),
    [([], []), (["n", "n", "q"], ["n", "q"]), ("all", ["key", "q", "n"])],
)
def test_which_columns_are_kept(tmp_path: Path, keep: Any, names: list[str]) -> None:
    rows = load(job_over(tmp_path, ROWS, output={"keep": keep}))
    assert rows.kept.column_names == names
    assert rows.ids is None


def test_kept_columns_are_mapped_and_of_any_type(tmp_path: Path) -> None:
    columns = {
        "q": ["a"] * 3_000,
        "list": [[1, 2]] * 3_000,
        "struct": [{"a": None, "b": "x"}] * 3_000,
        "category": pa.array(["x", "y"] * 1_500).dictionary_encode(),
        "bytes": [b"\xff"] * 3_000,
    }
    before = pa.total_allocated_bytes()
    kept = load(job_over(tmp_path, columns, output={"keep": "all"})).kept
    assert kept.to_pydict() == pa.table(columns).to_pydict()
    assert pa.total_allocated_bytes() - before < kept.nbytes / 2


def test_invalid_text_is_a_fault_in_a_prompt_and_mended_when_kept(tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"a\xffb"], pa.binary()).view(pa.string())
    rows = load(job_over(tmp_path, {"q": bad, "other": bad}, output={"keep": ["other"]}))
    assert rows.prompts.faults == {1: "column `q` is not valid UTF-8 text"}
    assert rows.kept.to_pydict() == {"other": ["ok", "a�b"]}
    rows.kept.validate(full=True)


def test_lines_that_cannot_be_read_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a", "id": 1}\n{"q": \n{"q": "c", "id": 3}\n')
    rows = load(job_on(path, input={"id": "id"}))
    assert texts_of(rows.prompts) == ["<s>a", "", "<s>c"]
    assert rows.prompts.faults == {1: "rows.jsonl, line 2 is not valid JSON: Expecting value (column 6)"}
    assert rows.kept.to_pydict() == {"id": [1, None, 3]}


def test_special_tokens_are_added_to_texts_and_not_to_chats(tmp_path: Path) -> None:
    conversation = json.dumps([{"role": "user", "content": "x"}])
    rows = load(job_over(tmp_path, {"p": ["x", conversation, "y"]}, prompt={"column": "p"}))
    assert texts_of(rows.prompts) == ["<s>x", "[user]x\n[assistant]", "<s>y"]
    assert ids_of(rows.prompts)[0][0] == BOS


def test_tokens_are_those_of_the_tokenizer_itself(tmp_path: Path) -> None:
    tokenizer = phi_tokenizer()
    texts = [f"Question {number}: naïve 東京 {'x' * number}" for number in range(2_500)]
    rows = load(job_over(tmp_path, {"q": texts}), tokenizer)
    assert ids_of(rows.prompts) == [tokenizer(text)["input_ids"] for text in texts]
    messages = [{"role": "user", "content": "{{ q }}"}]
    rows = load(job_over(tmp_path, {"q": texts[:20]}, prompt={"messages": messages}), tokenizer)
    for ids, text in zip(ids_of(rows.prompts), texts):
        chat = [{"role": "user", "content": text}]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == expected


def test_a_slow_tokenizer_and_what_it_refuses(tmp_path: Path) -> None:
    rows = load(job_over(tmp_path, {"q": ["ab", "\x00", "c"]}), PythonTokenizer())
    assert ids_of(rows.prompts) == [[1, 97, 98], [], [1, 99]]
    assert rows.prompts.faults == {1: "the prompt cannot be tokenised: no zeros"}


def test_a_prompt_without_tokens_is_a_fault(tmp_path: Path) -> None:
    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[] for _ in texts]}

    tokenizer.chat_template = None  # type: ignore[attr-defined]
    rows = load(job_over(tmp_path, {"q": ["\u200b"]}), tokenizer)
    assert rows.prompts.faults == {0: "the prompt has no tokens"}


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.csv"])
def test_zero_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "rows.parquet":
        pq.write_table(pa.table({"q": pa.array([], pa.string()), "id": pa.array([], pa.int64())}), path)
    else:
        path.touch()
    generate = {"n": {"column": "id"}}
    rows = load(job_on(path, input={"id": "id"}, output={"keep": ["q"]}, generate=generate))
    assert rows.prompts.num_rows == 0
    assert (len(rows.prompts.tokens), len(rows.prompts.params_of), rows.prompts.faults) == (0, 0, {})
    assert rows.kept.column_names == ["id", "q"]
    assert rows.kept.num_rows == 0


def test_progress_counts_rows_and_tokens(tmp_path: Path) -> None:
    class Progress:
        rows = tokens = calls = 0

        def advance(self, rows: int, tokens: int) -> None:
            self.rows, self.tokens, self.calls = self.rows + rows, self.tokens + tokens, self.calls + 1

    progress = Progress()
    rows = load(job_over(tmp_path, {"q": ["ab", None, "c"] * 1_000}), progress=progress)
    assert (progress.rows, progress.tokens) == (3_000, len(rows.prompts.tokens))
    assert progress.calls > 1


# Parameters


def test_parameters_of_columns_are_gathered(tmp_path: Path) -> None:
    columns = {
        "q": ["x"] * 6,
        "budget": [5.0, 7.0, 5.0, 0.0, 5.5, None],
        "stops": [["a"], ["b"], ["a"], ["a"], ["a"], ["a"]],
    }
    generate = {"max_tokens": {"column": "budget"}, "stop": {"column": "stops"}, "temperature": 0.5}
    prompts = load(job_over(tmp_path, columns, generate=generate)).prompts
    base, first, second = prompts.params
    assert base == SamplingParams(max_tokens=256, temperature=0.5)
    assert first == SamplingParams(max_tokens=5, temperature=0.5, stop=("a",))
    assert second == SamplingParams(max_tokens=7, temperature=0.5, stop=("b",))
    assert prompts.params_of.tolist() == [1, 2, 1, 0, 0, 0]
    assert prompts.faults == {
        3: "column `budget`: max_tokens must be at least 1, found the number 0",
        4: "column `budget`: max_tokens must be a whole number, found the number 5.5",
        5: "column `budget` is null",
    }


def test_parameters_of_a_csv_file_are_numbers_in_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("q,t,flag,s\na,0.5,true,END\nb,1,false,2\nc,hot,false,x\n")
    generate = {"temperature": {"column": "t"}, "ignore_eos": {"column": "flag"}, "stop": {"column": "s"}}
    prompts = load(job_on(path, generate=generate)).prompts
    assert [prompts.params[index] for index in prompts.params_of] == [
        SamplingParams(max_tokens=256, temperature=0.5, ignore_eos=True, stop=("END",)),
        SamplingParams(max_tokens=256, temperature=1.0, stop=("2",)),
        SamplingParams(max_tokens=256),
    ]
    assert prompts.faults == {2: "column `t`: temperature must be a number, found the text `hot`"}


def test_parameters_of_the_wrong_kind_are_faults(tmp_path: Path) -> None:
    columns = {"q": ["x"], "s": [{"a": 1}], "tokens": [[1, None]]}
    for column, message in (
        ("s", "column `s`: stop_token_ids must be a value, found a mapping"),
        ("tokens", "column `tokens`: stop_token_ids[1] must be a whole number, found nothing"),
    ):
        generate = {"stop_token_ids": {"column": column}}
        assert load(job_over(tmp_path, columns, generate=generate)).prompts.faults == {0: message}


# Columns that are not there


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"input": {"id": "kye"}}, "input.id: there is no column `kye`; did you mean `key`?"),
        (
            {"output": {"keep": ["n", "zz"]}},
            "output.keep[1]: there is no column `zz`; the columns are `key`, `q`, `n`",
        ),
        (
            {"generate": {"n": {"column": "N"}}},
            "generate.n.column: there is no column `N`; did you mean `n`?",
        ),
        ({"prompt": {"column": "qq"}}, "prompt.column: there is no column `qq`; did you mean `q`?"),
        ({"prompt": {"text": "{{ qq }}"}}, "prompt.text uses `qq`, which is no column; did you mean `q`?"),
    ],
)
def test_missing_columns_stop_the_job_before_anything_is_written(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    job = job_over(tmp_path, ROWS, **sections)
    with pytest.raises(JobError) as caught:
        validate_columns(job, open_input(job.input).schema)
    assert str(caught.value) == f"job.yaml: {message}"
    with pytest.raises(JobError):
        load(job)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_missing_chat_template_stops_the_job_before_anything_is_written(tmp_path: Path) -> None:
    job = job_over(tmp_path, ROWS, prompt={"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(ModelError):
        load(job, byte_tokenizer(None))
    assert list((tmp_path / "work").iterdir()) == []


def test_a_kept_column_cannot_have_the_name_of_a_result(tmp_path: Path) -> None:
    job = job_over(tmp_path, {"q": ["a"], "output": ["b"]}, output={"keep": "all"})
    with pytest.raises(JobError, match=r"^job\.yaml: output\.keep: .*output"):
        validate_columns(job, open_input(job.input).schema)


# In memory


def test_prompts_in_memory() -> None:
    hot, cold = SamplingParams(temperature=1.0), SamplingParams()
    prompts = prompts_from_list(
        ["ab", [7, 8], {"prompt": "c"}, {"prompt_token_ids": np.array([9])}, "", []],
        [hot, cold, hot, cold, hot, cold],
        byte_tokenizer(),
    )
    ids = ids_of(prompts)
    assert byte_tokenizer().decode(ids[0]) == "<s>ab"
    assert ids[1:] == [
        [7, 8],
        [BOS, *byte_tokenizer()("c", add_special_tokens=False)["input_ids"]],
        [9],
        [],
        [],
    ]
    assert prompts.params == (hot, cold)
    assert prompts.params_of.tolist() == [0, 1] * 3
    assert prompts.faults == {4: "the prompt is empty", 5: "the prompt is empty"}
    assert prompts.tokens.dtype == np.int32


def test_no_prompts_in_memory() -> None:
    prompts = prompts_from_list([], SamplingParams(), byte_tokenizer())
    assert (prompts.num_rows, len(prompts.tokens), prompts.offsets.tolist()) == (0, 0, [0])


@pytest.mark.parametrize(
    "prompt", [3, [1.5], ["a"], {"text": "x"}, {"prompt": "a", "multi_modal_data": {"image": 1}}, None]
)
def test_prompts_of_another_kind(prompt: Any) -> None:
    with pytest.raises(
        TypeError, match=r"prompt 1 (must be text or a list of token ids|has multi_modal_data)"
    ):
        prompts_from_list(["a", prompt], SamplingParams(), byte_tokenizer())


def test_a_fault_of_one_prompt_is_its_own() -> None:
    given = [
        {"prompt_token_ids": []},
        [5, -1],
        [2**31],
        {"prompt_token_ids": np.array([]), "prompt": "a"},
        [5],
    ]
    prompts = prompts_from_list(given, SamplingParams(), byte_tokenizer())
    assert ids_of(prompts) == [[], [], [], [], [5]]
    assert prompts.faults == {
        0: "the prompt is empty",
        1: "the prompt has the token id -1, which no model knows",
        2: "the prompt has the token id 2,147,483,648, which no model knows",
        3: "the prompt is empty",
    }


def test_as_many_params_as_prompts() -> None:
    with pytest.raises(ValueError, match="2 prompts need as many SamplingParams or one, found 1"):
        prompts_from_list(["a", "b"], [SamplingParams()], byte_tokenizer())


# Scale


def test_prompts_are_tokenised_many_at_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        calls.append(len(texts))
        return {"input_ids": [[7] * 3 for _ in texts]}

    tokenizer.chat_template = None  # type: ignore[attr-defined]
    load(job_over(tmp_path, {"q": [f"question {number}" for number in range(10_000)]}), tokenizer)
    assert sum(calls) == 10_000 and len(calls) <= 20


def test_loading_holds_a_few_batches_only(tmp_path: Path) -> None:
    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[7] * (len(text) // 4) for text in texts]}

    tokenizer.chat_template = None  # type: ignore[attr-defined]
    texts = [f"{number} " + "x" * 2_000 for number in range(16_000)]
    job = job_over(tmp_path, {"q": texts}, output={"keep": "all"})
    del texts
    tracemalloc.start()
    rows = load(job, tokenizer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    as_python_numbers = 8 * len(rows.prompts.tokens)
    assert peak < as_python_numbers / 3
