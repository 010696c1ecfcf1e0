"""Answers of a run as lines of a batch output file.

{"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, ..., "body": {...}}, "error": null}
{"id": "batch_req_...", "custom_id": "b", "response": null, "error": {"code": "...", "message": "..."}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xxhash import xxh3_128_hexdigest

from batchllm.openai_batch.requests import CHAT

Answer = Mapping[str, Any]  # one row of a run's output


def error_line(number: int, custom_id: str | None, code: str, message: str) -> dict[str, Any]:
    """The line for a request that has no answer."""
    error = {"code": code, "message": message}
    return {"id": _id("batch_req", number), "custom_id": custom_id, "response": None, "error": error}


def answer_line(
    number: int, answers: Sequence[Answer], tokenizer: Any, model: str, created: int
) -> dict[str, Any]:
    """The line for a request from its samples, in order. One that failed speaks for all."""
    first = answers[0]
    failed = next((answer for answer in answers if answer["error"] is not None), None)
    if failed is not None:
        return error_line(number, first["custom_id"], "cannot_be_answered", str(failed["error"]))
    is_chat = first["url"] == CHAT
    completion_tokens = sum(len(answer["output_tokens"]) for answer in answers)
    body = {
        "id": _id("chatcmpl" if is_chat else "cmpl", number),
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": first["model"] or model,
        "choices": [_choice(index, answer, is_chat, tokenizer) for index, answer in enumerate(answers)],
        "usage": {
            "prompt_tokens": first["prompt_tokens"],
            "completion_tokens": completion_tokens,
            "total_tokens": first["prompt_tokens"] + completion_tokens,
        },
    }
    response = {"status_code": 200, "request_id": _id("req", number), "body": body}
    return {
        "id": _id("batch_req", number),
        "custom_id": first["custom_id"],
        "response": response,
        "error": None,
    }


def _choice(index: int, answer: Answer, is_chat: bool, tokenizer: Any) -> dict[str, Any]:
    logprobs = None
    if answer.get("logprobs") is not None:
        logprobs = (_chat_logprobs if is_chat else _logprobs)(answer, tokenizer)
    said = (
        {"message": {"role": "assistant", "content": answer["output"]}}
        if is_chat
        else {"text": answer["output"]}
    )
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": answer["finish_reason"]}


def _chat_logprobs(answer: Answer, tokenizer: Any) -> dict[str, Any]:
    tops = answer.get("top_logprobs") or [[] for _ in answer["output_tokens"]]
    tokens = zip(answer["output_tokens"], answer["logprobs"], tops)
    return {
        "content": [
            {
                **_token(token, value, tokenizer),
                "top_logprobs": [_token(other["token"], other["logprob"], tokenizer) for other in top],
            }
            for token, value, top in tokens
        ]
    }


def _token(token: int, logprob: float, tokenizer: Any) -> dict[str, Any]:
    text = str(tokenizer.decode([token]))
    return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}


def _logprobs(answer: Answer, tokenizer: Any) -> dict[str, Any]:
    texts = [str(tokenizer.decode([token])) for token in answer["output_tokens"]]
    offsets = [0]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    tops = answer.get("top_logprobs") or []
    return {
        "tokens": texts,
        "token_logprobs": answer["logprobs"],
        "top_logprobs": [
            {str(tokenizer.decode([other["token"]])): other["logprob"] for other in top} for top in tops
        ],
        "text_offset": offsets[: len(texts)],
    }


def _id(kind: str, number: int) -> str:
    """The same for the same line of the same file."""
    return f"{kind}-{xxh3_128_hexdigest(f'{kind} {number}'.encode())[:24]}"
