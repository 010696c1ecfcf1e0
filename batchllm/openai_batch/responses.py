"""Answers of a run as lines of a batch output file.

{"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, ..., "body": {...}}, "error": null}
{"id": "batch_req_...", "custom_id": "b", "response": null, "error": {"code": "...", "message": "..."}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, islice
from typing import Any

from xxhash import xxh3_128_hexdigest

from batchllm.openai_batch.requests import CHAT, BatchRequest, Echo

Answer = Mapping[str, Any]  # one row of a run's output


def error_line(number: int, custom_id: str | None, code: str, message: str) -> dict[str, Any]:
    """The line for a request that has no answer."""
    error = {"code": code, "message": message}
    return {"id": _id("batch_req", number), "custom_id": custom_id, "response": None, "error": error}


def answer_line(
    number: int, request: BatchRequest, answers: Sequence[Answer], tokenizer: Any, model: str, created: int
) -> dict[str, Any]:
    """The line for a request from its samples, in order. One that failed speaks for all."""
    first = answers[0]
    failed = next((answer for answer in answers if answer["error"] is not None), None)
    if failed is not None:
        return error_line(number, first["custom_id"], "cannot_be_answered", str(failed["error"]))
    is_chat = request.url == CHAT
    if request.echo == "alone":
        answers = [{**answer, **_NOTHING} for answer in answers]
    completion_tokens = sum(len(answer["output_tokens"]) for answer in answers)
    body = {
        "id": _id("chatcmpl" if is_chat else "cmpl", number),
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": first["model"] or model,
        "choices": [_choice(index, request, answer, tokenizer) for index, answer in enumerate(answers)],
        "usage": {
            "prompt_tokens": first["prompt_tokens"],
            "completion_tokens": completion_tokens,
            "total_tokens": first["prompt_tokens"] + completion_tokens,
        },
    }
    if is_chat and first.get("prompt_logprobs") is not None:
        body["prompt_logprobs"] = prompt_logprobs(first, tokenizer)
    response = {"status_code": 200, "request_id": _id("req", number), "body": body}
    return {
        "id": _id("batch_req", number),
        "custom_id": first["custom_id"],
        "response": response,
        "error": None,
    }


_NOTHING = {"output": "", "output_tokens": [], "logprobs": [], "top_logprobs": []}


def _choice(index: int, request: BatchRequest, answer: Answer, tokenizer: Any) -> dict[str, Any]:
    logprobs = None
    if request.params.get("logprobs"):
        logprobs = (_chat_logprobs if request.url == CHAT else _logprobs)(answer, tokenizer, request.echo)
    if request.url == CHAT:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": answer["output"]}}
    else:
        said = {"text": (request.content if request.echo else "") + answer["output"]}
    shown = {"index": index, **said, "logprobs": logprobs, "finish_reason": answer["finish_reason"]}
    if request.url != CHAT and not request.echo and answer.get("prompt_logprobs") is not None:
        shown["prompt_logprobs"] = prompt_logprobs(answer, tokenizer)
    return shown


def prompt_logprobs(answer: Answer, tokenizer: Any) -> list[dict[str, Any] | None]:
    """As vLLM's server gives them: by token id, nothing for the first token."""
    shown: list[dict[str, Any] | None] = [None]
    for chosen, beside in islice(zip(answer["prompt_logprobs"], answer["prompt_top_logprobs"]), 1, None):
        ranks: list[tuple[Any, int | None]] = [(chosen, None)]
        ranks += [(other, rank) for rank, other in enumerate(beside, start=1)]
        shown.append({str(token["token"]): _ranked(token, rank, tokenizer) for token, rank in ranks})
    return shown


def _ranked(token: Mapping[str, Any], rank: int | None, tokenizer: Any) -> dict[str, Any]:
    text = str(tokenizer.decode([token["token"]]))
    return {"logprob": _finite(token["logprob"]), "rank": rank, "decoded_token": text}


def _chat_logprobs(answer: Answer, tokenizer: Any, _echo: Echo | None) -> dict[str, Any]:
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
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode(errors="replace"))}


def _logprobs(answer: Answer, tokenizer: Any, echo: Echo | None) -> dict[str, Any]:
    tokens = list(answer["output_tokens"])
    values: list[float | None] = [_finite(value) for value in answer["logprobs"]]
    tops: list[Any] = list(answer.get("top_logprobs") or [])
    if echo:
        prompt = answer["prompt_logprobs"]
        tokens = [token["token"] for token in prompt] + tokens
        values = [
            None if token["logprob"] is None else _finite(token["logprob"]) for token in prompt
        ] + values
        tops = [None, *answer["prompt_top_logprobs"][1:], *tops]
    texts = [str(tokenizer.decode([token])) for token in tokens]
    offsets = [0, *accumulate(map(len, texts[:-1]))]
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": [top if top is None else _by_text(top, tokenizer) for top in tops],
        "text_offset": offsets[: len(texts)],
    }


def _by_text(top: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, float]:
    return {str(tokenizer.decode([other["token"]])): _finite(other["logprob"]) for other in top}


def _finite(logprob: float) -> float:
    """JSON has no infinity; -9999 stands for it, as in OpenAI's and vLLM's answers."""
    return max(logprob, -9999.0)


def _id(kind: str, number: int) -> str:
    """The same for the same line of the same file."""
    return f"{kind}-{xxh3_128_hexdigest(f'{kind} {number}'.encode())[:24]}"
