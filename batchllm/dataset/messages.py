"""Conversations as a chat template wants them: a list of {role, content} with text content."""

from __future__ import annotations

import json
from typing import Any

from batchllm.dataset.rows import RowFault


def parse_messages(text: str) -> list[Any] | None:
    """The conversation written in a text as a JSON list of objects with a role, or None: an ordinary text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return value
    return None


def clean_messages(messages: list[Any]) -> list[dict[str, Any]] | RowFault:
    """The same conversation without the nulls of a column whose messages do not all have the same fields."""
    if not messages:
        return RowFault("the conversation has no messages")
    cleaned = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return RowFault(f"message {number} has no role")
        fields = {name: value for name, value in message.items() if value is not None}
        content = _text_content(fields.get("content"))
        if content is None and "tool_calls" not in fields:
            what = "has no content" if fields.get("content") is None else "has content that is not text"
            return RowFault(f"message {number} {what}")
        cleaned.append(fields | {"content": content})
    if cleaned[-1]["content"] == "":
        return RowFault("the prompt is empty: its last message has no text")
    return cleaned


def _text_content(content: object) -> str | None:
    """Content may be a text or a list of text parts."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else None
