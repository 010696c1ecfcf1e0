"""Conversations in columns: tools, switches of the template, and messages that the model goes on with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm import LLM, SamplingParams
from batchllm.dataset.chat_args import ChatArgs
from batchllm.dataset.prompts import PromptRenderer
from batchllm.dataset.reader import open_input
from batchllm.dataset.rows import RowFault
from batchllm.errors import JobError
from batchllm.job import InputSpec, PromptSpec
from tests.jobs import exit_code_of, make_job, read_output, save_model
from tests.tiny_tokenizer import byte_tokenizer

TEMPLATE = (
    "{% if tools %}tools: {% for tool in tools %}{{ tool['name'] }} {% endfor %}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% if not thinking %}(no thinking) {% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def prompt_lengths(tmp_path: Path, model: Path, rows: list[dict[str, Any]], **prompt: Any) -> list[Any]:
    """Bytes of each row's prompt, as every byte is a token; or its error."""
    job = make_job(tmp_path, model, rows, prompt={"column": "messages", **prompt}, generate={"max_tokens": 1})
    exit_code_of("run", job, "--quiet")
    table = read_output(tmp_path / "out")
    return [error or tokens for error, tokens in zip(table["error"], table["prompt_tokens"])]


def test_many_turns_and_tools_of_each_row(tmp_path: Path, model: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    plain = "".join(f"[{turn['role']}] {turn['content']}\n" for turn in turns) + "[assistant] "
    tools = [{"name": "search"}, {"name": "open"}]
    rows = [
        {"id": 0, "messages": turns, "tools": json.dumps(tools), "think": True},
        {"id": 1, "messages": turns, "tools": None, "think": False},
        {"id": 2, "messages": turns, "tools": json.dumps(tools[:1]), "think": None},
    ]
    args = {"tools": {"column": "tools"}, "thinking": {"column": "think"}}
    assert prompt_lengths(tmp_path, model, rows, template_args=args) == [
        len("tools: search open " + plain),
        len(plain + "(no thinking) "),
        len("tools: search " + plain + "(no thinking) "),
    ]


def test_the_model_goes_on_with_the_last_message(tmp_path: Path, model: Path) -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two"}]
    rows = [{"id": 0, "messages": messages, "args": '{"continue_final_message": true}'}]
    rows.append({"id": 1, "messages": messages, "args": None})
    rows.append({"id": 2, "messages": messages, "args": '{"tokenize": true}'})
    rows.append({"id": 3, "messages": messages, "args": "[1]"})
    going_on = "[user] Count\n[assistant] one, two"
    assert prompt_lengths(tmp_path, model, rows, template_args={"column": "args"}) == [
        len(going_on),
        len(going_on + "\n[assistant] (no thinking) "),
        "column `args`: tokenize cannot be set; remove it",
        "column `args` must hold a mapping of arguments for the chat template, or JSON of one",
    ]
    everywhere = {"continue_final_message": True, "thinking": True}
    assert prompt_lengths(tmp_path / "b", model, rows, template_args=everywhere) == [len(going_on)] * 4


def test_columns_that_are_not_there_are_named() -> None:
    with pytest.raises(
        JobError, match=r"job: prompt.template_args.tools: there is no column `tolls`; did you mean"
    ):
        ChatArgs({"tools": {"column": "tolls"}}, ["tools"], "job")
    with pytest.raises(JobError, match=r"prompt.template_args: there is no column `x`"):
        ChatArgs({"column": "x"}, ["tools"], "job")
    assert ChatArgs({"a": 1}, [], "job").of({}) == {"a": 1, "add_generation_prompt": True}
    structs = ChatArgs({"tools": {"column": "t"}}, ["t"], "job").of({"t": [{"a": 1, "b": None}]})
    assert not isinstance(structs, RowFault) and structs["tools"] == [{"a": 1}]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLS = (
    "{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('no such role') }}{% endif %}<{{ m.role }}>"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}</>\n{% endfor %}"
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def call(name: str, arguments: Any) -> dict[str, Any]:
    calls = [{"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def prompts(
    rows: list[Any], args: dict[str, Any] | None = None, unknown: str = "error", **columns: list[Any]
) -> list[str]:
    batch = pa.RecordBatch.from_pydict({"m": rows, **columns})
    spec = PromptSpec(column="m", template_args=args or {}, unknown_template_args=unknown)
    rendered = PromptRenderer(spec, tokenizer(), batch.schema).render(batch)
    return [f"! {item.reason}" if isinstance(item, RowFault) else item.text for item in rendered]


def tokenizer() -> Any:
    made = byte_tokenizer()
    made.chat_template = CALLS
    return made


def direct(messages: list[Any], **args: Any) -> str:
    begins = not args.get("continue_final_message")
    return str(
        tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=begins, **args)
    )


def test_calls_and_results_of_tools_read_as_the_template_expects() -> None:
    answer = {"role": "tool", "content": "", "tool_call_id": "1"}
    weather = [user("?"), call("weather", {"city": "Paris"}), answer]
    time = [user("?"), call("time", {"zone": "x"}), {**answer, "content": "noon"}]
    wanted = [direct(weather), direct(time)]
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in wanted[0]
    assert prompts([weather, time]) == wanted, "structs, which have the fields of all rows"
    as_text = [
        [conversation[0], call(name, arguments), conversation[2]]
        for conversation, name, arguments in (
            (weather, "weather", '{"city": "Paris"}'),
            (time, "time", '{"zone": "x"}'),
        )
    ]
    assert prompts(as_text) == wanted
    assert prompts([json.dumps(row) for row in as_text]) == wanted
    nothing = [user("a"), {**reply("b"), "tool_calls": []}, user("c")]
    assert prompts([nothing]) == [direct([user("a"), reply("b"), user("c")])]
    assert prompts([[user("a"), call("f", "not json"), user("b")]]) == [
        direct([user("a"), call("f", "not json"), user("b")])
    ]


def test_bad_conversations_are_faults_of_their_rows() -> None:
    rows = [[user("a")], {"role": "user", "content": "a"}, [{"content": "a"}], [user("a"), "b"], []]
    rows += [[{"role": "alien", "content": "a"}], [{"other": 1}], {"a": 1}]
    assert prompts([json.dumps(row) for row in rows]) == [
        direct([user("a")]),
        "! column `m`: one message stands alone; put it into a list",
        "! column `m`: message 1 has no role",
        "! column `m`: message 2 has no role",
        "! column `m`: the conversation has no messages",
        "! chat template: no such role",
        '[{"other": 1}]',
        '{"a": 1}',
    ]


def test_only_a_message_of_the_model_is_gone_on_with() -> None:
    rows = [
        [user("a"), reply("b ")],
        [user("a")],
        [user("a"), reply("<think>c</think>b")],
        [user("a"), reply("")],
    ]
    going_on = {"continue_final_message": True}
    assert prompts(rows, going_on) == [
        direct(rows[0], **going_on),
        "! continue_final_message needs a last message of the model, found one of role user",
        "! continue_final_message: the chat template leaves out or changes some of the last message "
        "(most drop its reasoning), so that it cannot be continued",
        "<user>a</>\n<assistant>",
    ]


def test_wrong_tools_of_a_row() -> None:
    tools = ["oops", '["x"]', json.dumps([TOOL]), None]
    assert prompts([[user("a")]] * 4, {"tools": {"column": "t"}}, t=tools) == [
        "! column `t`: tools must be a list of mappings, or JSON of one, found the text `oops`",
        "! column `t`: tools must be a list of mappings, found one that holds the text `x`",
        direct([user("a")], tools=[TOOL]),
        direct([user("a")]),
    ]
    assert prompts([[user("a")]], {"tools": json.dumps([TOOL])}) == [direct([user("a")], tools=[TOOL])]


def test_an_argument_that_the_template_ignores_is_refused() -> None:
    said = "the model's chat template does not use `enable_thinkng`; did you mean `enable_thinking`?"
    args = ['{"enable_thinkng": false}', '{"enable_thinking": false}', '{"nonsense": null}']
    assert prompts([[user("a")]] * 3, {"column": "given"}, given=args) == [
        f"! column `given`: {said}",
        direct([user("a")], enable_thinking=False),
        direct([user("a")]),
    ]
    for wrong, message in (
        ({"enable_thinkng": False}, f"job: prompt.template_args: {said}"),
        ({"documents": [{"text": "a"}]}, "does not use `documents`"),
        ({"tools": "oops"}, "job: prompt.template_args: tools must be a list"),
        ({"chat_template": 5}, "chat_template must be text, found the number 5"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt must be true or false"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "begins one; remove one"),
    ):
        with pytest.raises(JobError, match=re.escape(message)):
            prompts([[user("a")]], wrong)


def test_an_argument_that_the_template_ignores_may_be_allowed() -> None:
    same = [direct([user("a")])]
    assert prompts([[user("a")]], {"nonsense": 1}, "ignore") == same
    assert prompts([[user("a")]], {"column": "given"}, "ignore", given=['{"nonsense": 1}']) == same
    with pytest.raises(JobError, match="tokenize cannot be set"):
        prompts([[user("a")]], {"tokenize": True}, "ignore")


def test_chat_in_memory_takes_the_same(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    (folder / "chat_template.jinja").write_text(CALLS)
    llm = LLM(str(folder), device="cpu")

    def asked(messages: list[Any], **args: Any) -> list[str | None]:
        outputs = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False, **args)
        return [output.outputs[0].error or output.prompt for output in outputs]

    turns = [user("a"), reply("b ")]
    assert asked(turns, continue_final_message=True, add_generation_prompt=False) == [
        "<user>a</>\n<assistant>b "
    ]
    called = [user("a"), call("f", '{"x": 1}'), {"role": "tool", "content": "", "tool_call_id": "1"}]
    plain = [user("a"), call("f", {"x": 1}), {"role": "tool", "content": "", "tool_call_id": "1"}]
    with pytest.warns(
        UserWarning, match="^1 of 3 prompts were not answered; .* prompt 1: message 1 has no role$"
    ):
        outputs = asked([called, [{"content": "x"}], [user("a")]], tools=[TOOL])
    assert outputs == [
        direct(plain, tools=[TOOL]),
        "message 1 has no role",
        direct([user("a")], tools=[TOOL]),
    ]
    assert asked([user("a")], chat_template_kwargs={"enable_thinking": False}) == [
        direct([user("a")], enable_thinking=False)
    ]
    with pytest.warns(UserWarning, match="ignored: the model's chat template does not use `nonsense`"):
        ignored = asked([user("a")], chat_template_kwargs={"nonsense": 1})  # as vLLM does
    assert ignored == [direct([user("a")])]
    for wrong in ({"tools": "x"}, {"chat_template_kwargs": {"tokenize": True}}):
        with pytest.raises(ValueError, match=r"tools must be|tokenize cannot be set"):
            asked([user("a")], **wrong)


def test_switches_in_a_csv_file_are_those_of_a_parquet_file(tmp_path: Path) -> None:
    """CSV has no booleans: `false` comes as a text, which counts as true."""
    switches = [True, False, None, False]
    wanted = [direct([user("a")], **({} if on is None else {"enable_thinking": on})) for on in switches]
    assert wanted[0] != wanted[1]
    args = {"enable_thinking": {"column": "think"}}
    spec = PromptSpec.model_validate({"messages": [user("{{ q }}")], "template_args": args})
    table = pa.table({"q": ["a"] * 4, "think": switches})
    pq.write_table(table, tmp_path / "rows.parquet")
    for style, texts in (("plain", ("true", "false")), ("pandas", ("True", "False"))):
        cells = ["" if on is None else texts[not on] for on in switches]
        (tmp_path / f"{style}.csv").write_text("q,think\n" + "".join(f"a,{cell}\n" for cell in cells))
    for name in ("rows.parquet", "plain.csv", "pandas.csv"):
        data = open_input(InputSpec(path=str(tmp_path / name)))
        renderer = PromptRenderer(spec, tokenizer(), data.schema)
        found = [prompt for batch in data.batches() for prompt in renderer.render(batch.data)]
        assert [prompt for prompt in found if isinstance(prompt, RowFault)] == []
        assert [prompt.text for prompt in found if not isinstance(prompt, RowFault)] == wanted, name
    assert prompts([[user("a")]] * 2, {"tools": {"column": "t"}}, t=["true", "other"]) == [
        "! column `t`: tools must be a list of mappings, or JSON of one, found true",
        "! column `t`: tools must be a list of mappings, or JSON of one, found the text `other`",
    ]
