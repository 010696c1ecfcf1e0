from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_load import job_on, job_over, load, texts_of
from tiny_tokenizers import phi_tokenizer

from batchllm.core import PromptTable, RequestTable
from batchllm.dataset.load import validate_columns
from batchllm.errors import JobError
from batchllm.planner import PlanOptions, build_plan

MUSIQUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "cacheblend" / "musique_s.json"
INSTRUCTION = "Answer the question in as few words as possible, from these passages only.\n\nPassages:\n\n"
LOOP = "{% for name, value in fields %}{{ name }}={{ value }};{% endfor %}{{ q }}"
ROWS: dict[str, Any] = {
    "q": ["q0", "q1", "q2", "q3"],
    "id": ["r0", "r1", "r2", "r3"],
    "genre": ["drama", "drama", "comedy", "drama"],
    "passages": [["own 0", "long passage A"], ["long passage A", "own 1"], ["own 2", "own 3"], []],
}


def prompts_of(folder: Path, columns: dict[str, Any], **prompt: Any) -> list[str]:
    texts = texts_of(load(job_over(folder, columns, prompt=prompt)).prompts)
    return [text.removeprefix("<s>") for text in texts]


def test_columns_in_an_order_that_shares(tmp_path: Path) -> None:
    assert prompts_of(tmp_path, ROWS, text=LOOP, reorder=["id", "genre"]) == [
        "genre=drama;id=r0;q0",
        "genre=drama;id=r1;q1",
        "genre=comedy;id=r2;q2",  # one order for all rows, where no other saves more
        "genre=drama;id=r3;q3",
    ]


def test_passages_in_an_order_that_shares(tmp_path: Path) -> None:
    text = "{% for p in passages %}[{{ p }}]{% endfor %}{{ q }}"
    rows = load(
        job_over(tmp_path, ROWS, prompt={"text": text, "reorder": "passages"}, output={"keep": "all"})
    )
    assert texts_of(rows.prompts) == [
        "<s>[long passage A][own 0]q0",
        "<s>[long passage A][own 1]q1",
        "<s>[own 2][own 3]q2",
        "<s>q3",
    ]
    assert rows.kept.to_pydict() == ROWS  # what is kept is the input
    assert rows.reordering_saves == pytest.approx(len("[long passage A]"), abs=4)
    as_given = load(job_over(tmp_path, ROWS, prompt={"text": text}))
    assert texts_of(as_given.prompts)[0] == "<s>[own 0][long passage A]q0"
    assert as_given.reordering_saves == 0


def test_structs_repeats_and_nulls_in_lists(tmp_path: Path) -> None:
    one, two = {"title": "t", "n": 1}, {"title": "u", "n": 2}
    columns = {"passages": [[two, one, one], [one, two], None, [one, one]]}
    text = "{% for p in passages %}{{ p.title }}{{ p.n }} {% endfor %}"
    rows = load(job_over(tmp_path, columns, prompt={"text": text, "reorder": "passages"}))
    texts = texts_of(rows.prompts)
    assert sorted(texts[0].removeprefix("<s>").split()) == ["t1", "t1", "u2"]
    assert all(text.startswith("<s>t1 ") for text in (texts[0], texts[1], texts[3]))
    assert rows.prompts.faults == {2: "column `passages` is null"}


def test_a_row_with_a_fault_changes_nothing(tmp_path: Path) -> None:
    columns = {**ROWS, "genre": ["drama", None, "comedy", "drama"]}
    rows = load(job_over(tmp_path, columns, prompt={"text": LOOP, "reorder": ["id", "genre"]}))
    assert texts_of(rows.prompts) == [
        "<s>genre=drama;id=r0;q0",
        "",
        "<s>genre=comedy;id=r2;q2",
        "<s>genre=drama;id=r3;q3",
    ]
    assert rows.prompts.faults == {1: "column `genre` is null"}


def test_what_stands_before_decides_who_can_share(tmp_path: Path) -> None:
    columns = {"q": ["q0", "q1"], "a": ["x", "y"], "b": ["same", "same"]}
    before = "{{ q }} {% for name, value in fields %}{{ value }} {% endfor %}"
    assert prompts_of(tmp_path, columns, text=before, reorder=["a", "b"]) == ["q0 x same ", "q1 y same "]
    tasks = {"task": ["t", "u", "t", "u"], "a": ["x", "x", "y", "y"], "b": ["1", "2", "1", "2"]}
    text = "{% if task %}{{ task }}:{% endif %}{{ fields }}"
    assert prompts_of(tmp_path, tasks, text=text, reorder=["a", "b"]) == [
        "t:b: 1\na: x",
        "u:b: 2\na: x",
        "t:b: 1\na: y",
        "u:b: 2\na: y",
    ]
    inside = "{% for name, value in fields %}{{ q }}{{ value }} {% endfor %}"
    assert prompts_of(tmp_path, columns, text=inside, reorder=["a", "b"]) == ["q0x q0same ", "q1y q1same "]


def test_messages(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Read."},
        {"role": "user", "content": "{{ passages | join('|') }}"},
        {"role": "user", "content": "{{ q }}"},
    ]
    texts = prompts_of(tmp_path, ROWS, messages=messages, reorder="passages")
    assert texts[0] == "[system]Read.\n[user]long passage A|own 0\n[user]q0\n[assistant]"


def test_marked_columns_elsewhere_stay_where_they_are(tmp_path: Path) -> None:
    texts = prompts_of(tmp_path, ROWS, text=LOOP + " {{ id }} {{ genre }}", reorder=["id", "genre"])
    assert texts[0] == "genre=drama;id=r0;q0 r0 drama"


def test_orders_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    passages = [[f"passage {item}" for item in generator.choice(40, 5, replace=False)] for _ in range(60)]
    text = "{{ passages | join('|') }}"
    texts = prompts_of(tmp_path, {"passages": passages}, text=text, reorder="passages")
    shuffle = generator.permutation(60)
    shuffled = prompts_of(
        tmp_path, {"passages": [passages[i] for i in shuffle]}, text=text, reorder="passages"
    )
    assert shuffled == [texts[i] for i in shuffle]
    assert [sorted(t.split("|")) for t in texts] == [sorted(row) for row in passages]


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (
            {"text": "{{ passages }}", "reorder": "passage"},
            "there is no column `passage`; did you mean `passages`?",
        ),
        ({"text": LOOP, "reorder": ["id", "gender"]}, "there is no column `gender`; did you mean `genre`?"),
        (
            {"text": "{{ q }}", "reorder": "q"},
            "`q` holds string, and only the elements of a list can be reordered",
        ),
        ({"text": "{{ q }}", "reorder": "passages"}, "no template uses `passages`"),
        ({"text": "{{ q }}", "reorder": ["id", "genre"]}, "no template uses `fields`"),
    ],
)
def test_complaints_about_columns(tmp_path: Path, prompt: dict[str, Any], complaint: str) -> None:
    job = job_over(tmp_path, ROWS, prompt=prompt)
    with pytest.raises(JobError) as error:
        validate_columns(job, pq.read_schema(tmp_path / "rows.parquet"))
    assert str(error.value).startswith("job.yaml: prompt.reorder: ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_column_named_fields(tmp_path: Path) -> None:
    schema = pa.schema([("fields", pa.string()), ("a", pa.string()), ("b", pa.string())])
    plain = job_on(tmp_path / "none.parquet", prompt={"text": "{{ fields }}"})
    validate_columns(plain, schema)
    job = job_on(tmp_path / "none.parquet", prompt={"text": "{{ fields }}", "reorder": ["a", "b"]})
    with pytest.raises(JobError, match="would hide the input's column of that name; rename the column"):
        validate_columns(job, schema)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (
            {"text": "t", "reorder": 3},
            "must be the name of a list column or a list of columns, found the number 3",
        ),
        ({"text": "t", "reorder": ["a"]}, "must name one list column, as in passages, or several columns"),
        ({"text": "t", "reorder": ["a", "b", "a"]}, "names the column `a` twice"),
        ({"column": "c", "reorder": "p"}, "prompt has reorder, which needs a template"),
    ],
)
def test_complaints_about_the_job(tmp_path: Path, prompt: dict[str, Any], complaint: str) -> None:
    with pytest.raises(JobError) as error:
        job_on(tmp_path / "rows.parquet", prompt=prompt)
    assert complaint in str(error.value)
    assert str(error.value).startswith("job.yaml: prompt")


def test_the_resolved_job_is_the_same_job(tmp_path: Path) -> None:
    for reorder in ("passages", ["a", "b"], None):
        job = job_on(tmp_path / "rows.parquet", prompt={"text": "{{ q }}", "reorder": reorder})
        again = json.loads(json.dumps(job.resolved()))["prompt"]
        assert again.get("reorder") == reorder
        assert job_on(tmp_path / "rows.parquet", prompt=again).prompt == job.prompt


def test_json_lines_and_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps({"p": ["b", "shared"]}), "{broken", json.dumps({"p": ["shared", "c"]})]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    prompt = {"text": "{{ p | join }}", "reorder": "p"}
    assert texts_of(load(job_on(file, prompt=prompt)).prompts) == ["<s>sharedb", "", "<s>sharedc"]
    assert load(job_on(file, prompt=prompt, input={"limit": 0})).prompts.num_rows == 0
    assert texts_of(load(job_on(file, prompt=prompt, input={"limit": 1})).prompts) == ["<s>bshared"]


def saved_share(prompts: PromptTable) -> float:
    """Of the prompt tokens, by the planner."""
    rows = prompts.num_rows
    key = np.stack([np.arange(rows), np.zeros(rows)], axis=1).astype(np.uint64)
    requests = RequestTable(np.arange(rows), np.zeros(rows, dtype=np.int32), key)
    stats = build_plan(prompts, requests, np.ones(rows, dtype=bool), PlanOptions()).stats
    return 1 - stats.distinct_tokens / stats.prompt_tokens


@pytest.mark.skipif(not MUSIQUE.exists(), reason="../shared/data has no cacheblend")
def test_musique(tmp_path: Path) -> None:
    """0.011 as given, 0.134 here. A maximum spanning tree of what rows have in common, which is an upper bound
    for whole passages, comes to about 0.165.
    """
    data = json.loads(MUSIQUE.read_text(encoding="utf-8"))
    columns = {"q": [row["question"] for row in data], "ctxs": [row["ctxs"] for row in data]}
    text = INSTRUCTION + "{% for ctx in ctxs %}{{ ctx.text }}\n\n{% endfor %}Question: {{ q }}"
    tokenizer = phi_tokenizer()
    given = saved_share(load(job_over(tmp_path, columns, prompt={"text": text}), tokenizer).prompts)
    rows = load(job_over(tmp_path, columns, prompt={"text": text, "reorder": "ctxs"}), tokenizer)
    chosen = saved_share(rows.prompts)
    assert given == pytest.approx(0.011, abs=0.001)
    assert chosen >= 0.13
    assert rows.reordering_saves == pytest.approx((chosen - given) * len(rows.prompts.tokens), rel=0.03)
