"""One line of an OpenAI batch file → what is to be answered, or why it cannot be.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], ...}}

Bodies are those of chat completions and completions, with the extra sampling parameters that vLLM's server takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from batchllm.dataset.chat_args import wrong_args
from batchllm.dataset.messages import clean_messages, parse_messages
from batchllm.dataset.rows import RowFault
from batchllm.job_errors import describe
from batchllm.job_sections import GenerateSpec, InvalidParam
from batchllm.suggest import nearest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# Name in a body → name of the sampling parameter.
_SAMPLING = {
    **{
        name: name
        for name in (
            "temperature top_p top_k min_p n seed stop stop_token_ids ignore_eos best_of repetition_penalty "
            "frequency_penalty presence_penalty logit_bias bad_words allowed_token_ids min_tokens "
            "skip_special_tokens"
        ).split()
    },
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "include_stop_str_in_output": "include_stop",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "prompt_logprobs": "prompt_logprobs",
}
_TEMPLATE = (
    "add_generation_prompt continue_final_message chat_template documents reasoning_effort".split()
)  # names in a body that chat templates know too
_IGNORED = frozenset(  # what is answered does not depend on them
    "model user metadata store service_tier parallel_tool_calls stream_options prediction safety_identifier "
    "prompt_cache_key prompt_cache_retention".split()
)
# Asked for nothing by these values, and not to be had otherwise.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tool_choice": ("none", "auto"),
    "verbosity": ("medium",),
    "web_search_options": (),
    "audio": (),
}
_CHAT_ONLY = frozenset(
    {"messages", "tools", "top_logprobs", "response_format", "chat_template_kwargs", *_TEMPLATE}
)
_KNOWN = {"prompt", "echo", *_SAMPLING, *_IGNORED, *_ABSENT, *_CHAT_ONLY, "logprobs", "response_format"}


Echo = Literal["before", "alone"]


class BadLine(ValueError):
    """A line that cannot be answered. `code` is one word for programs."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


@dataclass(frozen=True)
class BatchRequest:
    """One request. `params` are those given, as sampling parameters; `template_args` for the chat template."""

    custom_id: str
    url: str
    content: str  # the prompt, or the messages as JSON
    params: Mapping[str, Any]
    template_args: str | None  # JSON
    model: str | None
    echo: Echo | None = None  # the prompt comes before the answer, or in its place


def parse_line(line: bytes, max_tokens: int) -> BatchRequest:
    """Raises BadLine. `max_tokens`: where the body does not say."""
    try:
        record = json.loads(line.decode())
        if rb"\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeError:
        raise BadLine("invalid_json", "the line is not valid UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise BadLine(
            "invalid_json", f"the line is not valid JSON: {error.msg} (column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadLine("invalid_json", f"the line is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadLine("invalid_request", f"a line must be a JSON object, found {describe(record)}")
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        found = "none" if custom_id is None else describe(custom_id)
        raise BadLine("missing_custom_id", f"custom_id must be text that names the request, found {found}")
    try:
        return _request(custom_id, record, max_tokens)
    except BadLine as error:
        error.custom_id = custom_id
        raise
    except RecursionError:
        message = "the line has lists or objects inside each other too often"
        raise BadLine("invalid_json", message, custom_id) from None


def _request(custom_id: str, record: Mapping[str, Any], max_tokens: int) -> BatchRequest:
    if record.get("method", "POST") != "POST":
        raise BadLine("invalid_method", f"method must be POST, found {describe(record['method'])}")
    url, body = record.get("url"), record.get("body")
    if url not in (CHAT, COMPLETIONS):
        raise BadLine("invalid_url", f"url must be {CHAT} or {COMPLETIONS}, found {describe(url)}")
    if not isinstance(body, dict):
        raise BadLine("invalid_body", f"body must be a JSON object, found {describe(body)}")
    body = {name: value for name, value in body.items() if value is not None}
    _check_names(body, url)
    if "max_completion_tokens" in body:
        body.pop("max_tokens", None)  # its older name
    echo = _echo(body)
    if echo == "alone":
        body |= {"max_tokens": 1}  # the model has to read the prompt; the token is left out of the answer
    content = _messages(body) if url == CHAT else _prompt(body)
    params = _sampling(body, url, max_tokens)
    args = _template_args(body) if url == CHAT else {}
    model = body.get("model")
    return BatchRequest(
        custom_id,
        url,
        content,
        params,
        json.dumps(args) if args else None,
        model if isinstance(model, str) else None,
        echo,
    )


def _check_names(body: Mapping[str, Any], url: str) -> None:
    for name, value in body.items():
        if name not in _KNOWN or (url == COMPLETIONS and name in _CHAT_ONLY - {"response_format"}):
            hint = nearest(name, _KNOWN)
            known = f"; did you mean {hint}?" if hint and hint != name else ""
            raise BadLine("unknown_parameter", f"body.{name} is not a parameter of {url}{known}")
        if name == "echo" and value is not False and url == CHAT:
            raise BadLine("unsupported_parameter", f"body.echo belongs to {COMPLETIONS}; remove it")
        if name in _ABSENT and value not in _ABSENT[name]:
            raise BadLine("unsupported_parameter", f"body.{name} is not supported here; remove it")


def _echo(body: Mapping[str, Any]) -> Echo | None:
    echo = body.get("echo", False)
    if not isinstance(echo, bool):
        raise BadLine("invalid_parameter", f"body.echo must be true or false, found {describe(echo)}")
    most = body.get("max_tokens")
    if echo and most == 0 and not isinstance(most, bool):
        return "alone"
    return "before" if echo else None


def _messages(body: Mapping[str, Any]) -> str:
    messages = body.get("messages")
    if "prompt" in body:
        raise BadLine("invalid_request", f"body.prompt belongs to {COMPLETIONS}; {CHAT} takes messages")
    if not isinstance(messages, list):
        raise BadLine(
            "invalid_messages", f"body.messages must be a list of messages, found {describe(messages)}"
        )
    cleaned = clean_messages(messages)
    if isinstance(cleaned, RowFault):
        raise BadLine("invalid_messages", f"body.messages: {cleaned.reason}")
    return json.dumps(messages, ensure_ascii=False)


def _prompt(body: Mapping[str, Any]) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise BadLine(
            "invalid_prompt", f"body.prompt must be a text that is not empty, found {describe(prompt)}"
        )
    if parse_messages(prompt) is not None:
        raise BadLine("invalid_prompt", f"body.prompt is a list of messages; send it to {CHAT} as messages")
    return prompt


def _sampling(body: Mapping[str, Any], url: str, max_tokens: int) -> dict[str, Any]:
    given = {_SAMPLING[name]: value for name, value in body.items() if name in _SAMPLING}
    names = {_SAMPLING[name]: name for name in body if name in _SAMPLING}
    given |= _logprobs(body, url)
    if url == COMPLETIONS:
        names["top_logprobs"] = "logprobs"
    if "response_format" in body:
        wanted = _response_format(body["response_format"])
        if wanted and "json_schema" in given:
            message = (
                "body.response_format beside guided_json; an answer can have one structure, so remove one"
            )
            raise BadLine("invalid_parameter", message)
        given |= wanted
        names |= dict.fromkeys(wanted, "response_format")
    if given.get("top_k") == -1:
        given["top_k"] = 0
    given = {"temperature": 1.0, "max_tokens": max_tokens, **given}
    try:
        params = GenerateSpec().params(given)
    except InvalidParam as error:
        name = names.get(error.parameter, error.parameter)
        raise BadLine("invalid_parameter", f"body.{name} {str(error).partition(' ')[2]}") from None
    return {name: getattr(params, name) for name in given}


def _logprobs(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    wanted = body.get("logprobs", False)
    if url == CHAT:
        if "top_logprobs" in body and wanted is not True:
            raise BadLine("invalid_parameter", "body.top_logprobs needs logprobs: true beside it")
        return {
            "logprobs": wanted,
            **({"top_logprobs": body["top_logprobs"]} if "top_logprobs" in body else {}),
        }
    if wanted is False:
        return {}
    prompt = {"prompt_logprobs": body.get("prompt_logprobs", wanted)} if body.get("echo") else {}
    return {"logprobs": True, "top_logprobs": wanted, **prompt}


def _response_format(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if isinstance(schema, Mapping):
            return {"json_schema": schema}
        raise BadLine("invalid_parameter", "body.response_format.json_schema.schema must be a JSON schema")
    raise BadLine(
        "invalid_parameter",
        f"body.response_format.type must be text, json_object or json_schema, found {describe(kind)}",
    )


def _template_args(body: Mapping[str, Any]) -> dict[str, Any]:
    args = {name: body[name] for name in _TEMPLATE if name in body}
    extra = body.get("chat_template_kwargs", {})
    if not isinstance(extra, Mapping):
        raise BadLine(
            "invalid_parameter", f"body.chat_template_kwargs must be an object, found {describe(extra)}"
        )
    effort = args.get("reasoning_effort", "")
    if not isinstance(effort, str):
        raise BadLine("invalid_parameter", f"body.reasoning_effort must be text, found {describe(effort)}")
    tools = body.get("tools")
    if tools is not None:
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise BadLine("invalid_parameter", "body.tools must be a list of objects")
        if tools and body.get("tool_choice") != "none":
            args["tools"] = tools
    wrong = wrong_args({**extra, **args})
    if wrong is not None:
        place = "body." if wrong.partition(" ")[0] in args else "body.chat_template_kwargs."
        raise BadLine("invalid_parameter", place + wrong)
    return {**extra, **args}
