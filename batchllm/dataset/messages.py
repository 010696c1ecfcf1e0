"""Conversations as a chat template wants them: a list of {role, content} with text content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from batchllm.dataset.rows import RowFault

# Of these roles a message without a text asks for nothing. A tool may well answer nothing.
_ASKING = frozenset({"system", "developer", "user"})


def parse_messages(text: str) -> list[Any] | RowFault | None:
    """The conversation written in a text as JSON, a fault when it is hardly anything else, or None: an ordinary text.

    A list is a conversation when it is empty, when one of its elements has a role, and when all of them have content.
    """
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        one = {"role", "content"} <= set(value)
        return RowFault("one message stands alone; put it into a list") if one else None
    if any(isinstance(item, dict) and "role" in item for item in value):
        return list(value)
    return list(value) if all(isinstance(item, dict) and "content" in item for item in value) else None


def clean_messages(messages: list[Any]) -> list[dict[str, Any]] | RowFault:
    """The same conversation with contents as texts, arguments of tool calls as mappings, and without fields that are
    null: a column gives every message the fields of all."""
    if not messages:
        return RowFault("the conversation has no messages")
    cleaned = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return RowFault(f"message {number} has no role")
        fields = {name: value for name, value in message.items() if value is not None}
        if not fields.get("tool_calls", True):
            del fields["tool_calls"]
        content = _text_content(fields.get("content"))
        if content is None and ("tool_calls" not in fields or "content" in fields):
            what = "has content that is not text" if "content" in fields else "has no content"
            return RowFault(f"message {number} {what}")
        calls = fields.get("tool_calls")
        if isinstance(calls, list):
            fields["tool_calls"] = [_with_arguments(call) for call in calls]
        cleaned.append(fields | {"content": content})
    if cleaned[-1]["content"] == "" and cleaned[-1]["role"] in _ASKING:
        return RowFault("the prompt is empty: its last message has no text")
    return cleaned


def without_nulls(value: object) -> Any:
    """The same without the fields that are null, at any depth: Arrow gives every mapping the fields of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _text_content(content: object) -> str | None:
    """Content may be a text or a list of text parts."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else None


def _with_arguments(call: Any) -> Any:
    """OpenAI writes a call's arguments as JSON text; chat templates expect the mapping, and would quote the text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    text = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(text, str):
        return call
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed
