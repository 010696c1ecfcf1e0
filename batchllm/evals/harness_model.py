"""A model class of lm-evaluation-harness (0.4): scores and answers as its `hf` class gives them, from one planned run.

The conventions are those of `lm_eval.models.huggingface.HFLM`: how a pair is divided into tokens, what precedes an
empty context, what is cut off from long texts, windows of long documents, where generated text ends.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)

from batchllm import core
from batchllm.evals.kept_answers import KeptAnswers
from batchllm.llm import LLM
from batchllm.llm_outputs import CompletionOutput
from batchllm.llm_params import SamplingParams
from batchllm.scoring import Item, Score, TokenSpan, encode_all, move_spaces, prefix_token, windows

RequestType = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
REQUEST_TYPES: tuple[RequestType, ...] = ("loglikelihood", "loglikelihood_rolling", "generate_until")
Key = tuple[str, str, int]  # names a request: kind, arguments, how many equal ones came before
_SAMPLING = ("top_p", "top_k", "min_p", "seed", "repetition_penalty")


@dataclass
class _Owed:
    """A request whose answer is not there yet."""

    key: Key
    kind: RequestType
    request: Instance
    items: list[Item]
    name: str = ""  # among kept answers
    parts: dict[int, Score | CompletionOutput] = field(default_factory=dict)  # what came of each item

    def answer(self) -> tuple[Any, str | None]:
        """(generated text, or log-probability and whether it is greedy; why there is none), all parts being there."""
        parts = [self.parts[number] for number in range(len(self.items))]
        if parts and isinstance(parts[0], CompletionOutput):
            return parts[0].text, parts[0].error
        joined = Score.joined([part for part in parts if isinstance(part, Score)])
        return _pair_answer(joined), joined.error


@register_model("batchllm")
class BatchLM(TemplateLM):  # type: ignore[misc]
    """`pretrained` is a model folder or an LLM. The other arguments mean what they mean to HFLM."""

    def __init__(
        self,
        pretrained: str | LLM,
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        kv_memory: int | str = "auto",
        max_step_tokens: int | str = "auto",
        device: str | None = None,
        quiet: bool = True,
        **unused: Any,
    ):
        super().__init__()
        without_effect = {name for name, value in unused.items() if value is not None}
        unknown = sorted(without_effect - {"batch_size", "max_batch_size"})
        if unknown:
            raise TypeError(f"BatchLM() got an unexpected keyword argument {unknown[0]!r}")
        self.llm = (
            pretrained
            if isinstance(pretrained, LLM)
            else LLM(
                pretrained,
                dtype=dtype,
                device="cpu" if device == "cpu" else "auto",
                trust_remote_code=trust_remote_code,
                kv_memory=kv_memory,
                max_step_tokens=max_step_tokens,
            )
        )
        self.tokenizer = self.llm.get_tokenizer()
        self.max_length = max_length or resolve_max_length(self.llm.config, self.tokenizer)
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._chat_template_args = dict(chat_template_args or {})
        self._quiet = quiet
        self._ahead: dict[Key, Any] = {}  # answers computed before they are asked for
        self.kept: KeptAnswers | None = None  # answers are found there, and go there as they come
        self.runs = 0  # of the engine
        self.faults: list[str] = []  # what could not be answered, one sentence each

    # ---- what the harness calls

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.tokenizer) if self._prefix_token_id is None else self._prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self._encode([string], add_special_tokens)[string])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._answer("generate_until", requests)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        spans = [self._span(context, continuation) for _, context, continuation in requests]
        return [_pair_answer(score) for score in self.llm.score_and_generate(spans, not self._quiet)[0]]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation. A template that takes no system message gets the rest."""

        def rendered(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._chat_template_args,
            )
            return text

        try:
            return rendered(chat_history)
        except jinja2.exceptions.TemplateError:
            return rendered([message for message in chat_history if message["role"] != "system"])

    # ---- one run

    def run_ahead(self, requests: Mapping[str, Sequence[Instance]]) -> None:
        """Answers requests of all kinds in one planned run; asked for later, these are ready."""
        work = list(self._take_kept(list(self._owed(requests))))
        if not work:
            return
        self.runs += 1
        places = [(owed, number) for owed in work for number in range(len(owed.items))]
        items = [owed.items[number] for owed, number in places]
        for place, part in self.llm.score_and_generate_each(items, not self._quiet):
            owed, number = places[place]
            owed.parts[number] = part
            if self.kept is not None and len(owed.parts) == len(owed.items):
                answer, error = owed.answer()
                if error is None:
                    self.kept.add(owed.name, answer)
        for owed in work:
            answer, error = owed.answer()
            if error is not None:
                self._fault(owed.request, error)
            self._ahead[owed.key] = self._said(
                owed, "" if error and owed.kind == "generate_until" else answer
            )

    def _owed(self, requests: Mapping[str, Sequence[Instance]]) -> Iterator[_Owed]:
        for kind in REQUEST_TYPES:
            of_kind = list(requests.get(kind, ()))
            for key, request, items in zip(_keys(kind, of_kind), of_kind, self._items(kind, of_kind)):
                if key not in self._ahead:
                    yield _Owed(key, kind, request, items)

    def _take_kept(self, work: list[_Owed]) -> Iterator[_Owed]:
        """What is not among kept answers."""
        if self.kept is None or not work:
            yield from work
            return
        names, answers = self.kept.take([owed.items for owed in work])
        for owed, name, answer in zip(work, names, answers):
            owed.name = name
            if answer is None:
                yield owed
            else:
                self._ahead[owed.key] = self._said(owed, answer)

    def _answer(self, kind: RequestType, requests: list[Instance]) -> list[Any]:
        self.run_ahead({kind: requests})
        answers = []
        for key, request in zip(_keys(kind, requests), requests):
            answer = self._ahead.pop(key)
            self.cache_hook.add_partial(kind, request.args, answer)
            answers.append(answer)
        return answers

    def _items(self, kind: RequestType, requests: Sequence[Instance]) -> list[list[Item]]:
        if kind == "loglikelihood":
            return [[item] for item in self._pairs([request.args for request in requests])]
        if kind == "generate_until":
            return [[item] for item in self._prompts([request.args for request in requests])]
        encoded = self._encode([request.args[0] for request in requests])
        return [
            list(windows(encoded[request.args[0]], self.prefix_token_id, self.max_length))
            for request in requests
        ]

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Item]:
        moved = [
            move_spaces(context, continuation) if context else (context, continuation)
            for context, continuation in pairs
        ]
        texts = [
            text for context, continuation in moved if context for text in (context, context + continuation)
        ]
        encoded = self._encode(texts)
        bare = self._encode([continuation for context, continuation in moved if not context], False)
        items: list[Item] = []
        for context, continuation in moved:
            if context:
                before = encoded[context]
                items.append(self._span(before, encoded[context + continuation][len(before) :]))
            else:
                after = bare[continuation]
                starts = bool(after) and after[0] == self.prefix_token_id
                items.append(
                    self._span(after[:1], after[1:]) if starts else self._span([self.prefix_token_id], after)
                )
        return items

    def _span(self, context: Sequence[int], continuation: Sequence[int]) -> Item:
        """What of a pair the model can read: its last tokens, one more than `max_length`."""
        if not len(continuation):
            return "the continuation adds no token to the context; give it text of its own"
        if len(continuation) > self.max_length:
            return f"the continuation has {len(continuation):,} tokens; the model reads at most {self.max_length:,}"
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        return TokenSpan(tokens, len(tokens) - len(continuation))

    def _prompts(self, arguments: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Item]:
        encoded = self._encode([context for context, _ in arguments])
        known: dict[str, core.SamplingParams | str] = {}
        items: list[Item] = []
        for context, options in arguments:
            name = json.dumps(options, sort_keys=True, default=str)
            if name not in known:
                known[name] = self._params(options)
            params = known[name]
            if isinstance(params, str):
                items.append(params)
            elif not encoded[context]:
                items.append("the prompt has no tokens")
            else:
                items.append((encoded[context][-(self.max_length - params.max_tokens) :], params))
        return items

    def _params(self, options: Mapping[str, Any]) -> core.SamplingParams | str:
        """How to sample, or why not so."""
        normal: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        max_tokens = normal.pop("max_gen_toks")
        if max_tokens >= self.max_length:
            return (
                f"max_gen_toks is {max_tokens:,}; it must be less than the model's {self.max_length:,} tokens"
            )
        until, do_sample = normal.pop("until"), normal.pop("do_sample")
        temperature = normal.pop("temperature", 1.0 if do_sample else 0.0)
        sampling = {name: normal.pop(name) for name in _SAMPLING if name in normal}
        unknown = sorted(name for name, value in normal.items() if value is not None)
        if unknown:
            return f"generation_kwargs.{unknown[0]} is not known to BatchLLM; remove it"
        chosen = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature if do_sample else 0.0,
            stop=[stop for stop in until if stop],
            **sampling,
        )
        return chosen.resolved(seed=0, max_tokens=max_tokens)  # the same samples every night

    def _said(self, owed: _Owed, answer: Any) -> Any:
        """What the harness gets."""
        if owed.kind != "generate_until":
            return tuple(answer) if owed.kind == "loglikelihood" else answer[0]
        until = owed.request.args[1].get("until") or []
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = [until] if isinstance(until, str) else list(until)
        return str(postprocess_generated_text(answer, [*stops, eos], None))

    def _fault(self, request: Instance, reason: str) -> None:
        sentence = f"task {request.task_name}, document {request.doc_id}, request {request.idx}: {reason}"
        self.faults.append(sentence)
        warnings.warn(sentence, stacklevel=2)

    def _encode(self, texts: Sequence[str], special: bool | None = None) -> dict[str, Sequence[int]]:
        """A text that begins with BOS gets no second one."""
        special = self.add_bos_token if special is None else special
        prefix = self.tokenizer.decode(self.prefix_token_id)
        marked = [text for text in texts if special is not False and has_bos_prefix(text, prefix)]
        begun = set(marked)
        rest = [text for text in texts if text not in begun]
        return {**encode_all(self.tokenizer, rest, special), **encode_all(self.tokenizer, marked, False)}


def _pair_answer(score: Score) -> tuple[float, bool]:
    """A pair that cannot be scored is never the best one."""
    return (-math.inf, False) if score.error else (score.logprob, score.is_greedy)


def _keys(kind: str, requests: Sequence[Instance]) -> list[Key]:
    """The name of each request."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        name = json.dumps(request.args, sort_keys=True, default=str)
        keys.append((kind, name, seen[name]))
        seen[name] += 1
    return keys
