"""`batchllm run-batch`: every line of a batch file gets its line of output, whatever is wrong with it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.jobs import exit_code_of, save_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def request(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    content = {"messages": USER} if url == CHAT else {"prompt": "Once upon"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**content, **body}}


def bad_line(custom_id: str, kind: int) -> tuple[str | bytes, str, str, bool]:
    """(line, code, words of the message, whether the output can name the custom_id)."""
    good = json.dumps(request(custom_id))
    chat, text = (
        (lambda **body: json.dumps(request(custom_id, **body))),
        (lambda **body: json.dumps(request(custom_id, COMPLETIONS, **body))),
    )

    def changed(**fields: Any) -> str:
        return json.dumps({**request(custom_id), **fields})

    kinds: list[tuple[str | bytes, str, str, bool]] = [
        (good[:-9], "invalid_json", "not valid JSON", False),
        ("not json at all", "invalid_json", "not valid JSON", False),
        (b'{"custom_id": "\xff"}', "invalid_json", "not valid UTF-8", False),
        ("[1, 2]", "invalid_request", "must be a JSON object, found a list", False),
        ("null", "invalid_request", "must be a JSON object, found nothing", False),
        (changed(custom_id=None), "missing_custom_id", "found none", False),
        (changed(custom_id=7), "missing_custom_id", "found the number 7", False),
        (changed(custom_id=""), "missing_custom_id", "custom_id must be text", False),
        (changed(custom_id="first"), "duplicate_custom_id", "is that of line 1 too", False),
        (changed(method="GET"), "invalid_method", "must be POST, found the text `GET`", True),
        (changed(url="/v1/embeddings"), "invalid_url", "/v1/embeddings", True),
        (changed(url=None), "invalid_url", "found nothing", True),
        (changed(body=None), "invalid_body", "must be a JSON object", True),
        (changed(body=[]), "invalid_body", "found a list", True),
        (changed(body={}), "invalid_messages", "must be a list of messages, found nothing", True),
        (chat(messages=[]), "invalid_messages", "has no messages", True),
        (chat(messages="hi"), "invalid_messages", "found the text `hi`", True),
        (chat(messages=[{"content": "x"}]), "invalid_messages", "message 1 has no role", True),
        (chat(messages=[{"role": "user"}]), "invalid_messages", "message 1 has no content", True),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "invalid_messages",
            "content that is not text",
            True,
        ),
        (chat(prompt="x"), "invalid_request", "body.prompt belongs to", True),
        (chat(temperature="hot"), "invalid_parameter", "body.temperature must be a number", True),
        (chat(temperature=-1), "invalid_parameter", "body.temperature must be at least 0", True),
        (chat(top_p=1.5), "invalid_parameter", "body.top_p must be at most 1", True),
        (chat(max_tokens=0), "invalid_parameter", "body.max_tokens must be at least 1", True),
        (chat(max_completion_tokens=2.5), "invalid_parameter", "body.max_completion_tokens", True),
        (chat(n=0), "invalid_parameter", "body.n must be at least 1", True),
        (chat(logit_bias={"a": 1}), "invalid_parameter", "body.logit_bias must have token ids", True),
        (chat(logit_bias={"9999": 1}), "cannot_be_answered", "names token 9,999", True),
        (chat(stop=[1]), "invalid_parameter", "body.stop must be text", True),
        (chat(stream=True), "unsupported_parameter", "body.stream is not supported", True),
        (chat(temprature=1), "unknown_parameter", "did you mean temperature?", True),
        (chat(top_logprobs=3), "invalid_parameter", "needs logprobs: true", True),
        (chat(min_tokens=9, max_tokens=3), "invalid_parameter", "body.min_tokens 9 but max_tokens 3", True),
        (chat(tools="x"), "invalid_parameter", "body.tools must be a list", True),
        (
            chat(chat_template_kwargs={"tokenize": True}),
            "invalid_parameter",
            "body.chat_template_kwargs.tokenize cannot be set",
            True,
        ),
        (chat(continue_final_message=True), "cannot_be_answered", "needs a last message of the model", True),
        (chat(tool_choice="required"), "unsupported_parameter", "body.tool_choice", True),
        (
            chat(response_format={"type": "xml"}),
            "invalid_parameter",
            "text, json_object or json_schema",
            True,
        ),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}),
            "cannot_be_answered",
            "Invalid type: strin",
            True,
        ),
        (chat(guided_regex="a{99}", max_tokens=4), "cannot_be_answered", "4 tokens were not enough", True),
        (chat(guided_json="[" * 9000), "invalid_parameter", "body.guided_json must be a JSON schema", True),
        (chat(guided_json=r'{"enum": ["\ud83d"]}'), "invalid_parameter", "half a surrogate pair", True),
        (chat(logit_bias={"5": 10**400}), "invalid_parameter", "must have a number for token 5", True),
        (chat(reasoning_effort=1), "invalid_parameter", "body.reasoning_effort must be text", True),
        (chat(verbosity="low"), "unsupported_parameter", "body.verbosity is not supported", True),
        (
            chat(response_format={"type": "json_object"}, guided_json={}),
            "invalid_parameter",
            "body.response_format beside guided_json",
            True,
        ),
        (
            chat(guided_json={"allOf": [json.loads('{"not": ' * 300 + "{}" + "}" * 300)]}),
            "cannot_be_answered",
            "",
            True,
        ),
        (chat(guided_regex="a", guided_choice=["b"]), "invalid_parameter", "one structure", True),
        (
            chat(messages=[{"role": "user", "content": "x" * 600}]),
            "cannot_be_answered",
            "reads at most",
            True,
        ),
        (text(prompt=None), "invalid_prompt", "must be a text", True),
        (text(prompt=""), "invalid_prompt", "must be a text", True),
        (text(prompt=["a", "b"]), "invalid_prompt", "found a list", True),
        (text(prompt=json.dumps(USER)), "invalid_prompt", "send it to", True),
        (text(tools=[]), "unknown_parameter", "is not a parameter of /v1/completions", True),
        (text(echo="yes"), "invalid_parameter", "body.echo must be true or false", True),
        (text(logprobs="x"), "invalid_parameter", "body.logprobs must be a whole number", True),
        (text(prompt_logprobs=-1), "invalid_parameter", "body.prompt_logprobs must be true, false", True),
        (chat(echo=True), "unsupported_parameter", "body.echo belongs to", True),
    ]
    return kinds[kind % len(kinds)]


BAD_KINDS = 59


def good_line(custom_id: str, number: int) -> dict[str, Any]:
    """Requests of many kinds, with short answers; every third like many others."""
    kinds: list[dict[str, Any]] = [
        request(custom_id, temperature=0, max_tokens=2),
        request(custom_id, COMPLETIONS, temperature=0, max_tokens=1),
        request(custom_id, COMPLETIONS, temperature=0, max_tokens=2, prompt=[f"Once {number % 50}"]),
        request(
            custom_id, temperature=0, max_tokens=1, messages=[*USER, {"role": "assistant", "content": "I"}]
        ),
        request(custom_id, temperature=0, guided_choice=["a", "b"]),
        request(custom_id, max_tokens=1, temperature=0, user="x", metadata={"a": 1}, seed=None),
    ]
    if number % 40 == 0:
        return request(
            custom_id, temperature=1.2, max_completion_tokens=3, n=2, logprobs=True, top_logprobs=2
        )
    return kinds[number % len(kinds)]


def run(source: Path, target: Path, model: Path) -> int:
    settings = ["--model", str(model), "--set", "engine.kv_memory=16MiB", "--quiet"]
    return exit_code_of("run-batch", "-i", source, "-o", target, *settings)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_ten_thousand_lines_with_every_kind_of_bad_line(tmp_path: Path, model: Path) -> None:
    chance = random.Random(0)
    lines: list[bytes] = []
    bad: dict[int, tuple[str | bytes, str, str, bool]] = {}
    for number in range(10_000):
        custom_id = "first" if number == 0 else f"request {number}"
        if number and chance.random() < 0.3:
            bad[number] = bad_line(custom_id, len(bad))
            line = bad[number][0]
        else:
            line = json.dumps(good_line(custom_id, number))
        lines.append(line if isinstance(line, bytes) else line.encode())
    assert len(bad) > 10 * BAD_KINDS
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n\n")
    assert run(source, target, model) == 3
    answers = read_lines(target)
    assert len(answers) == 10_000
    assert len({answer["id"] for answer in answers}) == 10_000
    for number, answer in enumerate(answers):
        custom_id = "first" if number == 0 else f"request {number}"
        if number in bad:
            _, code, words, is_named = bad[number]
            assert answer["response"] is None
            assert answer["error"]["code"] == code and words in answer["error"]["message"], answer
            assert not is_named or answer["custom_id"] == custom_id
        else:
            assert answer["error"] is None and answer["custom_id"] == custom_id, answer
            check_answer(good_line(custom_id, number), answer["response"])


def check_answer(asked: dict[str, Any], response: dict[str, Any]) -> None:
    body, limits = response["body"], asked["body"]
    assert response["status_code"] == 200 and body["model"]
    most = limits.get("max_tokens", limits.get("max_completion_tokens", 256))
    assert len(body["choices"]) == limits.get("n", 1)
    assert (
        body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    )
    assert 1 <= body["usage"]["completion_tokens"] <= most * len(body["choices"])
    for index, choice in enumerate(body["choices"]):
        assert choice["index"] == index and choice["finish_reason"] in ("stop", "length")
        if asked["url"] == CHAT:
            assert body["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
        else:
            assert body["object"] == "text_completion" and isinstance(choice["text"], str)
        if "guided_choice" in limits:
            assert choice["message"]["content"] in limits["guided_choice"]
        if limits.get("logprobs"):
            assert all(len(token["top_logprobs"]) == 2 for token in choice["logprobs"]["content"])


def bodies(path: Path) -> dict[str, Any]:
    return {
        line["custom_id"]: line["response"] and line["response"]["body"]["choices"]
        for line in read_lines(path)
    }


def test_answers_do_not_depend_on_the_order_of_lines(tmp_path: Path, model: Path) -> None:
    lines = [good_line(f"r{number}", number) for number in (*range(30), 40, 80, 120)]
    lines += [request(f"s{number}", temperature=1.1, max_tokens=4) for number in range(10)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    assert run(source, target, model) == 0
    expected = bodies(target)
    random.Random(1).shuffle(lines)
    other, again = tmp_path / "shuffled.jsonl", tmp_path / "again.jsonl"
    other.write_text("\n".join(map(json.dumps, lines)))
    assert run(other, again, model) == 0
    found = bodies(again)
    assert list(found) == [line["custom_id"] for line in lines]
    assert {name: texts(choices) for name, choices in found.items()} == {
        name: texts(choices) for name, choices in expected.items()
    }
    assert len({json.dumps(texts(expected[f"s{number}"])) for number in range(10)}) > 5
    shutil.copy(other, source)  # the same command over changed lines: what is there already stays
    assert run(source, target, model) == 0
    assert list(bodies(target)) == list(found)


def texts(choices: Any) -> list[str]:
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]


def test_prompts_echoed_with_their_logprobs(tmp_path: Path, model: Path) -> None:
    say = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 3}
    lines = [
        request("plain", COMPLETIONS, **say, logprobs=2),
        request("echo", COMPLETIONS, **say, logprobs=2, echo=True),
        request("alone", COMPLETIONS, **{**say, "max_tokens": 0}, logprobs=0, echo=True),
        request("text", COMPLETIONS, **say, echo=True),
        request("vllm", COMPLETIONS, **say, prompt_logprobs=2),
        request("chat", temperature=0, max_tokens=1, prompt_logprobs=1),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    assert run(source, target, model) == 0
    body = {line["custom_id"]: line["response"]["body"] for line in read_lines(target)}
    plain, echo, alone, text, vllm = (
        body[name]["choices"][0] for name in ("plain", "echo", "alone", "text", "vllm")
    )
    length = body["plain"]["usage"]["prompt_tokens"]
    assert echo["text"] == text["text"] == say["prompt"] + plain["text"]
    assert text["logprobs"] is None
    assert echo["logprobs"]["tokens"][length:] == plain["logprobs"]["tokens"]
    assert "".join(echo["logprobs"]["tokens"][:length]) == say["prompt"]
    assert echo["logprobs"]["token_logprobs"][0] is None and echo["logprobs"]["top_logprobs"][0] is None
    assert echo["logprobs"]["token_logprobs"][length:] == pytest.approx(plain["logprobs"]["token_logprobs"])
    assert len(echo["logprobs"]["text_offset"]) == len(echo["logprobs"]["tokens"]) == length + 3
    assert {len(top) for top in echo["logprobs"]["top_logprobs"][1:]} <= {1, 2}  # texts of bytes may be equal
    assert alone["text"] == say["prompt"] and body["alone"]["usage"]["completion_tokens"] == 0
    assert alone["logprobs"]["tokens"] == echo["logprobs"]["tokens"][:length]
    of_prompt = echo["logprobs"]["token_logprobs"][1:length]
    assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(of_prompt)
    given = vllm["prompt_logprobs"]
    assert given[0] is None and len(given) == length and "prompt_logprobs" not in echo
    assert [next(iter(token.values()))["logprob"] for token in given[1:]] == pytest.approx(of_prompt)
    assert all({1, 2} <= {one["rank"] for one in token.values()} for token in given[1:])
    assert body["chat"]["prompt_logprobs"][0] is None
    assert len(body["chat"]["prompt_logprobs"]) == body["chat"]["usage"]["prompt_tokens"]


def test_what_the_chat_template_does_not_use_is_ignored(tmp_path: Path, model: Path) -> None:
    """As vLLM does. Parquet rows in an ordinary job are told of it, unless it says `ignore` too."""
    tool = {"type": "function", "function": {"name": "f"}}
    greedy = {"temperature": 0, "max_tokens": 4}
    lines = [
        request("plain", **greedy),
        request("switch", **greedy, chat_template_kwargs={"thinking": True}),
        request("documents", **greedy, documents=[{"text": "a"}]),
        request("tools", **greedy, tools=[tool]),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    assert run(source, target, model) == 0
    plain, *others = [answer["response"]["body"] for answer in read_lines(target)]
    assert [other["choices"] for other in others] == [plain["choices"]] * 3
    assert {other["usage"]["prompt_tokens"] for other in others} == {plain["usage"]["prompt_tokens"]}


def test_conversion_both_ways(tmp_path: Path, model: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    lines = [
        request("a", temperature=0.5, max_tokens=3, stop=["x"], logit_bias={"5": 1.5}, model="m"),
        request("b", COMPLETIONS, temperature=1.0, max_tokens=9, n=2, logprobs=2, guided_regex="a+"),
        request(
            "c", temperature=1.0, max_tokens=4, tools=[tool], chat_template_kwargs={"enable_thinking": False}
        ),
        request("d", temperature=1.0, max_tokens=256, response_format={"type": "json_object"}),
        request("e", COMPLETIONS, temperature=1.0, max_tokens=0, logprobs=1, echo=True),
        request("f", COMPLETIONS, temperature=1.0, max_tokens=3, echo=True, prompt_logprobs=1),
    ]
    source, table, back = (tmp_path / name for name in ("in.jsonl", "rows.parquet", "back.jsonl"))
    source.write_text("\n".join(map(json.dumps, lines)) + "\nnonsense\n")
    assert exit_code_of("convert-batch", source, table) == 3  # one line is no request
    rows = pl.read_parquet(table)
    assert rows["custom_id"].to_list() == list("abcdef")
    assert rows["max_tokens"].to_list() == [3, 9, 4, 256, 1, 3]
    assert exit_code_of("convert-batch", table, back) == 0
    del lines[3]["body"]["response_format"]
    lines[3]["body"]["guided_json"] = {"type": "object"}
    assert read_lines(back) == lines
    source.write_text("\n".join(map(json.dumps, lines[:2])))
    target, answers = tmp_path / "out.jsonl", tmp_path / "answers.parquet"
    assert run(source, target, model) in (0, 3)  # the pattern may come to no end in 9 tokens
    assert exit_code_of("convert-batch", target, answers) == 0
    assert pl.read_parquet(answers)["custom_id"].to_list() in (["a", "b", "b"], ["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run-batch", "-i", "nowhere.jsonl", "-o", "out.jsonl", "--model", "x"], "there is no such file"),
        (["run-batch", "-i", "in.jsonl", "-o", "no/out.jsonl", "--model", "x"], "does not exist"),
        (["run-batch", "-i", "in.jsonl", "-o", ".", "--model", "x"], "is a folder"),
        (["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", "./none"], "none"),
        (["convert-batch", "in.jsonl", "out.csv"], "one must be named .jsonl and the other .parquet"),
        (["convert-batch", "rows.parquet", "out.jsonl"], "has no column `custom_id`"),
    ],
)
def test_wrong_files_are_named(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(json.dumps(request("a")))
    pl.DataFrame({"x": [1]}).write_parquet("rows.parquet")
    before = sorted(tmp_path.iterdir())
    assert exit_code_of(*arguments) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


RESPONSE = {"custom_id": "a", "response": None, "error": {"message": "no"}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert-batch", "in.jsonl", "no/rows.parquet"], "no/rows.parquet: the folder"),
        (["convert-batch", "in.jsonl", "folder.parquet"], "is a folder; the target must name a file"),
        (["convert-batch", "broken.parquet", "out.jsonl"], "broken.parquet: cannot be read as Parquet"),
        (["convert-batch", "bytes.jsonl", "out.parquet"], "bytes.jsonl: line 2 is no line of a batch output"),
    ],
)
def test_files_that_cannot_be_converted_are_named(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.parquet").mkdir()
    Path("in.jsonl").write_text(json.dumps(request("a")))
    Path("bytes.jsonl").write_bytes(json.dumps(RESPONSE).encode() + b"\n\xff\n")
    rows = pl.DataFrame({"custom_id": ["a"], "prompt": ["Once " * 999]})
    rows.write_parquet("whole.parquet", compression="uncompressed")
    raw = Path("whole.parquet").read_bytes()
    Path("broken.parquet").write_bytes(raw[:4] + bytes(200) + raw[204:])
    before = sorted(tmp_path.iterdir())
    assert exit_code_of(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("refused", ["source", "target"])
@pytest.mark.parametrize("command", ["convert-batch", "run-batch"])
def test_no_permission_is_one_sentence(
    command: str,
    refused: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out" / "rows.parquet"
    source.write_text(json.dumps(request("a")))
    target.parent.mkdir()
    if refused == "target":
        monkeypatch.setattr("batchllm.durable.os.access", lambda path, mode: Path(path) != target.parent)
    else:
        monkeypatch.setattr(Path, "open", refusal(Path.open, source))
    files = [source, target] if command == "convert-batch" else ["-i", source, "-o", target, "--model", "x"]
    assert exit_code_of(command, *files) == 2
    said = capsys.readouterr().err
    assert f"{source}: cannot be read (" in said or "cannot be written, because this user may not" in said
    assert "Traceback" not in said
    assert list(target.parent.iterdir()) == []


def refusal(open_file: Any, refused: Path) -> Any:
    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == refused:
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments, **options)

    return opened


@pytest.mark.parametrize("name", ["rows.parquet", "back.jsonl"])
def test_a_conversion_that_fails_leaves_what_was_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, table, target = tmp_path / "in.jsonl", tmp_path / "table.parquet", tmp_path / "out" / name
    source.write_text(json.dumps(request("a")))
    assert exit_code_of("convert-batch", source, table) == 0
    target.parent.mkdir()
    target.write_text("of before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("batchllm.durable.sync_file", full)
        assert exit_code_of("convert-batch", source if name == "rows.parquet" else table, target) == 1
    said = capsys.readouterr().err
    assert f"{target}: cannot be written (No space left on device)" in said and "Traceback" not in said
    assert target.read_text() == "of before" and list(target.parent.iterdir()) == [target]
