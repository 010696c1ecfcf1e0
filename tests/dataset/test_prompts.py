from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from tiny_tokenizers import byte_tokenizer, phi_tokenizer

from batchllm.dataset.prompts import Prompt, PromptRenderer
from batchllm.dataset.rows import RowFault
from batchllm.errors import JobError, ModelError
from batchllm.job import PromptSpec


def renderer(batch: pa.RecordBatch, tokenizer: Any = None, **prompt: Any) -> PromptRenderer:
    return PromptRenderer(PromptSpec(**prompt), tokenizer or byte_tokenizer(), batch.schema, "job.yaml")


def rendered(batch: pa.RecordBatch, tokenizer: Any = None, **prompt: Any) -> list[str]:
    """The text of each prompt, or `! reason`."""
    return [
        f"! {prompt.reason}" if isinstance(prompt, RowFault) else prompt.text
        for prompt in renderer(batch, tokenizer, **prompt).render(batch)
    ]


def batch_of(**columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


QUESTIONS = batch_of(q=["one", "two", None], n=[1, 2, 3], unused=[b"\xff"] * 3)


# Text


def test_text_over_columns() -> None:
    assert rendered(QUESTIONS, text="{{ n }}. {{ q | upper }}?\n") == [
        "1. ONE?",
        "2. TWO?",
        "! column `q` is null",
    ]
    made = renderer(QUESTIONS, text="{% for i in range(n) %}{{ i }}{% endfor %}")
    assert made.columns == ("n",)
    assert made.render(QUESTIONS)[2] == Prompt("012", add_special_tokens=True)


def test_values_are_python_objects() -> None:
    batch = batch_of(tags=[["a", "b"], []], info=[{"k": 1.5}, {"k": None}], raw=[b"bytes", "ä".encode()])
    template = "{{ tags | join('+') }} {{ info.k }} {{ raw }}"
    assert rendered(batch, text=template) == ["a+b 1.5 bytes", " None ä"]


def test_a_template_without_columns() -> None:
    made = renderer(QUESTIONS, text="say something")
    assert made.columns == ()
    assert made.render(QUESTIONS.select([])) == [Prompt("say something", True)] * 3


def test_columns_whose_name_is_no_identifier() -> None:
    batch = batch_of(**{"the question": ["a"], "b-c": ["d"], "e": ["f"]})
    made = renderer(batch, text="{{ row['the question'] }}{{ row['b-c'] }}{{ row.e }}{{ e }}")
    assert made.columns == ("b-c", "e", "the question")
    assert [prompt.text for prompt in made.render(batch) if isinstance(prompt, Prompt)] == ["adff"]
    assert rendered(batch_of(row=["r"]), text="{{ row }}") == ["r"]
    assert rendered(batch_of(range=["r"], dict=["d"]), text="{{ range }}{{ dict }}") == ["rd"]


def test_a_null_is_no_fault_where_the_template_asks_for_it() -> None:
    batch = batch_of(q=["a", "b"], hint=["h", None])
    assert rendered(batch, text="{{ q }}{% if hint is not none %} ({{ hint }}){% endif %}") == ["a (h)", "b"]
    assert rendered(batch, text="{{ q }}{% if row.hint is none %}?{% endif %}") == ["a", "b?"]
    assert (
        rendered(batch, text="{{ q }}{% if hint %} ({{ hint }}){% endif %}")[1] == "! column `hint` is null"
    )
    messages = [{"role": "user", "content": "{{ hint is none }}"}, {"role": "user", "content": "{{ hint }}"}]
    assert rendered(batch, messages=messages)[1] == "! column `hint` is null"


def test_faults_of_single_rows() -> None:
    bad = pa.array([b"ok", b"\xff", b"", b"ok"], pa.binary()).view(pa.string())
    batch = pa.record_batch([bad, pa.array([1, 1, 1, 0])], names=["q", "n"])
    assert rendered(batch, text="{% if 1 / n %}{{ q }}{% endif %}") == [
        "ok", "! column `q` is not valid UTF-8 text", "! the prompt is empty", "! template error: division by zero",
    ]  # fmt: skip
    assert rendered(batch_of(s=[{"a": 1}]), text="{{ s.b }}") == [
        "! template error: 'dict object' has no attribute 'b'"
    ]


def test_templates_run_in_the_sandbox() -> None:
    for escape in ("{{ q.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ q.format.__globals__ }}"):
        assert rendered(QUESTIONS, text=escape)[0].startswith("! template error: access to attribute")
    changed = rendered(batch_of(tags=[["a"]]), text="{{ tags.append(1) }}")
    assert changed[0].startswith("! template error: access to attribute 'append'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ qq }}", "uses `qq`, which is no column; did you mean `q`?"),
        ("{{ zebra }}", "uses `zebra`, which is no column; the columns are `q`, `n`, `unused`"),
        ("{{ row['qq'] }}", "uses `qq`, which is no column; did you mean `q`?"),
        ("{{ row }}", 'can use `row` only with the name of a column, as in row["name"]'),
        ("a\n{{ q", "is not a valid template, line 2: unexpected end of template"),
        ("{% if q %}", "is not a valid template, line 1: Unexpected end of template"),
        ("{{ q | shout }}", "is not a valid template, line 1: No filter named 'shout'"),
        ("{{ [q] | random }}", "is not a valid template, line 1: No filter named 'random'"),
        ("{{ lipsum() }}", "uses `lipsum`, which is no column"),
        ("{% include 'other' %}", "includes another template; put all of the text into one"),
    ],
)
def test_wrong_templates_are_found_before_any_row(text: str, message: str) -> None:
    with pytest.raises(JobError) as caught:
        renderer(QUESTIONS, text=text)
    assert str(caught.value).startswith(f"job.yaml: prompt.text {message}")
    with pytest.raises(JobError, match=r"^job\.yaml: prompt\.messages\[1\]\.content "):
        renderer(QUESTIONS, messages=[{"role": "user", "content": "x"}, {"role": "user", "content": text}])


# Chat


def test_messages_go_through_the_chat_template() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "{{ q }}"}]
    made = renderer(QUESTIONS, messages=messages)
    assert made.render(QUESTIONS) == [
        Prompt("[system]be brief\n[user]one\n[assistant]", add_special_tokens=False),
        Prompt("[system]be brief\n[user]two\n[assistant]", add_special_tokens=False),
        RowFault("column `q` is null"),
    ]


def test_a_conversation_that_ends_with_nothing_is_an_empty_prompt() -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "{{ q }}"}]
    assert rendered(batch_of(q=["", "x"]), messages=messages) == [
        "! the prompt is empty: its last message has no text",
        "[system]\n[user]x\n[assistant]",
    ]


def test_template_args_reach_the_chat_template() -> None:
    messages = [{"role": "user", "content": "x"}]
    args = {"shout": True, "add_generation_prompt": False}
    assert rendered(QUESTIONS, messages=messages, template_args=args)[0] == "[user]x\n!"
    args = {"chat_template": "{{ messages[0].content }}"}
    assert rendered(QUESTIONS, byte_tokenizer(None), messages=messages, template_args=args)[0] == "x"
    with pytest.raises(JobError, match=r"prompt\.template_args: tokenize cannot be set"):
        renderer(QUESTIONS, messages=messages, template_args={"tokenize": True})


def test_chat_without_a_chat_template_is_refused() -> None:
    message = r"^job\.yaml: prompt\.messages needs a chat template and the model's tokenizer has none; "
    with pytest.raises(ModelError, match=message):
        renderer(QUESTIONS, byte_tokenizer(None), messages=[{"role": "user", "content": "x"}])


def test_what_the_chat_template_refuses_is_a_fault() -> None:
    batch = batch_of(m=[[{"role": who, "content": "x"}] for who in ("user", "alien")])
    assert rendered(batch, column="m") == ["[user]x\n[assistant]", "! chat template: unknown role alien"]


def test_the_chat_template_of_a_real_model() -> None:
    tokenizer = phi_tokenizer()
    (prompt, *_) = renderer(QUESTIONS, tokenizer, messages=[{"role": "user", "content": "{{ q }}"}]).render(
        QUESTIONS
    )
    assert prompt == Prompt("<|user|>\none<|end|>\n<|assistant|>\n", add_special_tokens=False)


# Column


def test_a_text_column_is_sent_as_it_is() -> None:
    texts = ["a {{ b }}\n", "", None, "[1, 2]", '["x"]', "[not json", "[" * 5_000]
    made = renderer(batch_of(p=texts), column="p")
    assert made.columns == ("p",)
    assert made.render(batch_of(p=texts)) == [
        Prompt("a {{ b }}\n", True), RowFault("the prompt is empty"), RowFault("column `p` is null"),
        Prompt("[1, 2]", True), Prompt('["x"]', True), Prompt("[not json", True), Prompt("[" * 5_000, True),
    ]  # fmt: skip


def test_a_column_of_conversations() -> None:
    conversations = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": None}],
        [],
        None,
        [{"role": None, "content": "a"}],
        [None],
    ]
    made = renderer(batch_of(m=conversations), column="m")
    assert made.render(batch_of(m=conversations)) == [
        Prompt("[user]a\n[assistant]b\n[assistant]", False),
        RowFault("column `m`: message 1 has no content"),
        RowFault("column `m`: the conversation has no messages"),
        RowFault("column `m` is null"),
        RowFault("column `m`: message 1 has no role"),
        RowFault("column `m`: message 1 has no role"),
    ]


def test_conversations_written_as_json() -> None:
    parts = '[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]'
    image = '[{"role": "user", "content": [{"type": "image", "url": "x"}]}]'
    batch = batch_of(m=[' [{"role": "user", "content": "a"}]', parts, image, '[{"role": "user"}]'])
    assert rendered(batch, column="m") == [
        "[user]a\n[assistant]", "[user]a\nb\n[assistant]", "! column `m`: message 1 has content that is not text",
        "! column `m`: message 1 has no content",
    ]  # fmt: skip
    without = rendered(batch, byte_tokenizer(None), column="m")
    assert without[0] == "! the model's tokenizer has no chat template"


def test_fields_that_only_other_messages_have_are_not_there() -> None:
    template = "{% for m in messages %}{{ m.name is defined }} {{ m.content }};{% endfor %}"
    messages = [
        [{"role": "user", "content": "a", "name": None}, {"role": "user", "content": "b", "name": "n"}]
    ]
    assert rendered(batch_of(m=messages), byte_tokenizer(template), column="m") == ["False a;True b;"]
    calls = '[{"role": "assistant", "content": null, "tool_calls": [1]}]'
    template = "{{ messages[0].content or 'nothing' }} {{ messages[0].tool_calls }}"
    assert rendered(batch_of(m=[calls]), byte_tokenizer(template), column="m") == ["nothing [1]"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("quest", "there is no column `quest`; the columns are `q`, `n`, `unused`"),
        ("n", "`n` holds int64, and a prompt is text or a list of {role, content}"),
    ],
)
def test_wrong_prompt_columns(column: str, message: str) -> None:
    with pytest.raises(JobError) as caught:
        renderer(QUESTIONS, column=column)
    assert str(caught.value) == f"job.yaml: prompt.column: {message}"


def test_a_column_of_conversations_needs_a_chat_template() -> None:
    batch = batch_of(m=[[{"role": "user", "content": "a"}]])
    with pytest.raises(ModelError, match=r"prompt\.column needs a chat template"):
        renderer(batch, byte_tokenizer(None), column="m")
