"""`LLM`: prompts in memory in, answers out, in vLLM's offline calling convention.

A script written for vLLM's `LLM(...).generate(prompts, SamplingParams(...))` moves by changing its import. What
differs: a prompt that cannot be answered gives an output with `error` set instead of ending the call, and prompts
are reordered and share prefixes over the whole list.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchllm import core
from batchllm.candidates import Candidates
from batchllm.core import PromptTable, RequestResult
from batchllm.dataset.keys import make_requests
from batchllm.dataset.load import prompts_from_list
from batchllm.dataset.prompts import Prompt, conversation_prompts
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.executor.device import choose_device, this_machine
from batchllm.executor.gate import check_lengths
from batchllm.executor.grammars import refuse_impossible_structures
from batchllm.executor.model_config import load_config, weight_bytes
from batchllm.executor.model_folder import check_model_folder
from batchllm.executor.quantize import check_quantization
from batchllm.executor.ready_model import load_ready_model
from batchllm.executor.trace import StepTrace
from batchllm.job_values import parse_bytes
from batchllm.limits import (
    longest_sequence,
    refuse_long_prompts,
    refuse_unknown_params,
    refuse_unknown_tokens,
)
from batchllm.llm_outputs import CompletionOutput, RequestOutput, completion_of, outputs_of, text_of
from batchllm.llm_params import SamplingParams
from batchllm.planner.plan import PlanOptions
from batchllm.report.progress import Progress
from batchllm.scoring import Item, Score, encode_all, mixed_table, pair_spans, windows
from batchllm.scoring import prefix_token as first_token
from batchllm.table_run import RunOptions, TableRun

# What vLLM's LLM takes and has no meaning here. Named so that a script need not change, and said once.
_WITHOUT_EFFECT = frozenset(
    "enable_prefix_caching enable_chunked_prefill gpu_memory_utilization max_num_seqs max_model_len enforce_eager "
    "swap_space disable_log_stats seed tokenizer_mode cpu_offload_gb block_size".split()
)


class LLM:
    """A model in memory. Raises ModelError when it cannot be used or would not be exact."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        trust_remote_code: bool = False,
        kv_memory: int | str = "auto",
        max_step_tokens: int | str = "auto",
        min_shared_tokens: int = 32,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        **others: Any,
    ):
        _check_others(others, tensor_parallel_size)
        if quantize is not None:
            check_quantization(quantize)
        check_model_folder(str(model), trust_remote_code, need_tokenizer=not skip_tokenizer_init)
        self._tokenizer = None if skip_tokenizer_init else load_tokenizer(str(model), trust_remote_code)
        config, _ = load_config(str(model), trust_remote_code)
        placement = choose_device(_device(device), weight_bytes(config, dtype), this_machine())
        self._model = load_ready_model(str(model), dtype, trust_remote_code, placement, quantize)
        memory = parse_bytes(kv_memory) if isinstance(kv_memory, str) and kv_memory != "auto" else kv_memory
        self._run_options = RunOptions(memory, max_step_tokens, PlanOptions(min_shared_tokens))
        self.last_run: TableRun | None = None  # of score_and_generate: what it shared
        self.trace: StepTrace | None = None  # set it, and the steps of the calls that follow are recorded

    def get_tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def config(self) -> Any:
        """transformers' configuration of the model."""
        return self._model.config

    def generate(
        self,
        prompts: str | Sequence[Any],
        sampling_params: core.SamplingParams | Sequence[core.SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers all prompts: texts, lists of token ids, or {"prompt": ...} / {"prompt_token_ids": ...}."""
        many = [prompts] if isinstance(prompts, str | Mapping) or _is_token_ids(prompts) else list(prompts)
        if self._tokenizer is None and any(text_of(prompt) is not None for prompt in many):
            raise ValueError("give token ids: the LLM was made with skip_tokenizer_init=True")
        params = SamplingParams() if sampling_params is None else sampling_params
        table = prompts_from_list(many, params, self._tokenizer)
        return self._answer(many, table, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: core.SamplingParams | Sequence[core.SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """`generate` for one conversation or a list of them, through the model's chat template.

        The model answers, or with `continue_final_message` goes on with the last message; `chat_template_kwargs` are
        what else the template takes, such as `enable_thinking`. Raises ValueError for arguments that it cannot take.
        A conversation that is wrong gives an output with `error` set, and the others are answered.
        """
        if self._tokenizer is None:
            raise ValueError("chat needs a tokenizer, and the LLM was made with skip_tokenizer_init=True")
        if isinstance(messages, str):
            raise ValueError("chat takes a list of messages, or a list of such lists; found text")
        many = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        given = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message or None,
            "tools": list(tools) if isinstance(tools, tuple) else tools,
            "chat_template": chat_template,
        }
        args = dict(chat_template_kwargs or {}) | {k: v for k, v in given.items() if v is not None}
        texts = conversation_prompts(self._tokenizer, many, args)
        params = SamplingParams() if sampling_params is None else sampling_params
        shown = [text.text if isinstance(text, Prompt) else "" for text in texts]
        return self._answer(shown, prompts_from_list(texts, params, self._tokenizer), use_tqdm)

    def score(
        self, contexts: Sequence[Any], continuations: Sequence[Any], use_tqdm: bool = True
    ) -> list[list[Score]]:
        """How probable each continuation is after its context: `continuations[i]` are those of `contexts[i]`.

        Texts or lists of token ids. Spaces at the end of a context count to the continuation; an empty context stands
        for the tokenizer's BOS, or EOS. A pair that cannot be scored gives a Score with `error` set.
        """
        if len(contexts) != len(continuations):
            raise ValueError(
                f"{len(contexts)} contexts need as many lists of continuations, found {len(continuations)}"
            )
        spans = pair_spans(self._tokenizer, contexts, continuations)
        flat = iter(self.score_and_generate([span for row in spans for span in row], use_tqdm)[0])
        return [[next(flat) for _ in row] for row in spans]

    def score_documents(
        self, documents: Sequence[Any], prefix_token: int | None = None, use_tqdm: bool = True
    ) -> list[Score]:
        """How probable whole texts are, in windows of the model's length (see scoring.windows): `perplexity` of each.

        The first token is scored after `prefix_token`; default: the tokenizer's first of BOS and EOS.
        """
        texts = encode_all(self._tokenizer, [text for text in documents if isinstance(text, str)], None)
        prefix = first_token(self._tokenizer) if prefix_token is None else prefix_token
        rows = [texts[text] if isinstance(text, str) else list(text) for text in documents]
        spans = [windows(row, prefix, self.max_length) for row in rows]
        flat = iter(self.score_and_generate([span for row in spans for span in row], use_tqdm)[0])
        return [Score.joined([next(flat) for _ in row]) for row in spans]

    def score_and_generate(
        self, items: Sequence[Item], use_tqdm: bool = True
    ) -> tuple[list[Score], list[CompletionOutput]]:
        """Texts to score and prompts to continue, planned together and run once; an item that is text is the reason
        why there is none. Scores of the spans (and reasons) in order, first answers of the prompts in order."""
        found = dict(self.score_and_generate_each(items, use_tqdm))
        in_order = [found[number] for number in range(len(items))]
        scores = [part for part in in_order if isinstance(part, Score)]
        return scores, [part for part in in_order if isinstance(part, CompletionOutput)]

    def score_and_generate_each(
        self, items: Sequence[Item], use_tqdm: bool = True
    ) -> Iterator[tuple[int, Score | CompletionOutput]]:
        """The same, as (number of the item, what came of it), each as soon as it is known."""
        vocabulary = self._model.vocab_size
        table, scored = mixed_table(items, self._model.max_length, vocabulary)
        generated = scored.first < 0
        prompts = refuse_unknown_tokens(table, vocabulary)
        long = refuse_long_prompts(table, self._model.max_length).faults
        faults = {row: reason for row, reason in long.items() if generated[row]} | dict(prompts.faults)
        prompts = replace(prompts, faults=faults)
        check_lengths(self._model.limit, longest_sequence(prompts), self._model.model_type)
        requests = make_requests(prompts, None, b"")
        run = TableRun(self._model, self._tokenizer, prompts, requests, self._run_options, scored, self.trace)
        with Progress(quiet=not use_tqdm).stage("running", len(requests)) as stage:
            for answer in run.results():
                stage.advance(1, answer.prompt_tokens + len(answer.output_tokens))
                if requests.sample[answer.request] == 0:
                    row = int(requests.row[answer.request])
                    yield row, _part_of(items[row], answer, run, row)
        self.last_run = run

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once; 2048 where it does not say, as in lm-evaluation-harness."""
        return self._model.max_length or 2048

    def _answer(self, many: list[Any], table: PromptTable, use_tqdm: bool) -> list[RequestOutput]:
        prompts = refuse_long_prompts(table, self._model.max_length)
        prompts = refuse_unknown_tokens(prompts, self._model.text_config.vocab_size)
        prompts = refuse_unknown_params(prompts, self._model.text_config.vocab_size)
        self._check_needs_no_tokenizer(prompts)
        prompts = refuse_impossible_structures(prompts, self._tokenizer, self._model.text_config.vocab_size)
        check_lengths(self._model.limit, longest_sequence(prompts), self._model.model_type)
        requests = make_requests(prompts, None, b"")
        candidates = Candidates(prompts, requests, None, b"")
        none = np.zeros(len(requests), dtype=bool)
        answers: list[RequestResult | None] = [None] * len(requests)
        with Progress(quiet=not use_tqdm).stage("running", len(requests)) as stage:
            tables = (candidates.prompts, candidates.requests)
            run = TableRun(self._model, self._tokenizer, *tables, self._run_options, trace=self.trace)
            for found in run.results():
                for answer in candidates.settle([found], none):
                    answers[answer.request] = answer
                    stage.advance(1, answer.prompt_tokens + len(answer.output_tokens))
        return outputs_of(many, prompts, requests, answers)

    def _check_needs_no_tokenizer(self, prompts: PromptTable) -> None:
        if self._tokenizer is None and any(params.bad_words or params.structure for params in prompts.params):
            raise ValueError("bad_words, choice, regex, json_schema and grammar need a tokenizer")


def _part_of(item: Item, answer: RequestResult, run: TableRun, row: int) -> Score | CompletionOutput:
    """What came of an item, which is a row of the run."""
    if isinstance(item, tuple):
        return completion_of(answer, 0)
    if answer.error is not None or isinstance(item, str):
        return Score.failed(answer.error or str(item))
    return Score(tuple(item.tokens[item.first :]), *run.score(row))


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, found {name!r}")
    return name


def _is_token_ids(prompts: Sequence[Any]) -> bool:
    return bool(prompts) and all(isinstance(token, int | np.integer) for token in prompts)


def _check_others(others: Mapping[str, Any], tensor_parallel_size: int) -> None:
    unknown = sorted(set(others) - _WITHOUT_EFFECT)
    if unknown:
        raise TypeError(f"LLM() got an unexpected keyword argument {unknown[0]!r}")
    if tensor_parallel_size != 1:
        raise ValueError("tensor_parallel_size must be 1: this version runs on one device")
    if others:
        warnings.warn(f"{', '.join(sorted(others))}: without effect in BatchLLM", stacklevel=3)
