"""Conversations in columns: tools, switches of the template, and messages that the model goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchllm.dataset.chat_args import ChatArgs
from batchllm.dataset.rows import RowFault
from batchllm.errors import JobError
from tests.jobs import exit_code_of, make_job, read_output, save_model

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
        "column `args`: tokenize cannot be set",
        "column `args` must hold a mapping of arguments for the chat template",
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
    assert ChatArgs({"a": 1}, [], "job").of({}) == {"a": 1, "add_generation_prompt": True, "tokenize": False}
    structs = ChatArgs({"tools": {"column": "t"}}, ["t"], "job").of({"t": [{"a": 1, "b": None}]})
    assert not isinstance(structs, RowFault) and structs["tools"] == [{"a": 1}]
