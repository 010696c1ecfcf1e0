"""`LLM`: prompts in memory in, answers out, in vLLM's offline calling convention.

A script written for vLLM's `LLM(...).generate(prompts, SamplingParams(...))` moves by changing its import. What
differs: a prompt that cannot be answered gives an output with `error` set, and a warning, instead of ending the call,
and prompts are reordered and share prefixes over the whole list.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchllm import core
from batchllm.candidates import Candidates
from batchllm.core import PromptTable, RequestResult
from batchllm.dataset.keys import make_requests
from batchllm.dataset.load import prompts_from_list
from batchllm.dataset.prompts import Prompt, conversation_prompts, unused_arg
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.errors import ArgumentError
from batchllm.executor.device import Placement, choose_device, this_machine
from batchllm.executor.generation_config import generation_notes
from batchllm.executor.model_config import load_config, weight_bytes
from batchllm.executor.model_folder import check_model_folder
from batchllm.executor.native import missing_kernels_note
from batchllm.executor.quantize import check_quantization
from batchllm.executor.ready_model import load_ready_model
from batchllm.executor.stopping import StopRules, end_of_sequence_ids
from batchllm.executor.trace import StepTrace
from batchllm.job_sections import EngineSpec, ModelSpec
from batchllm.limits import ModelLimits, usable
from batchllm.llm_arguments import (
    check_call,
    drawn_seed,
    our_arguments,
    prompt_list,
    readable_length,
    sections_of,
    seed_of,
    uses_defaults_of_model,
)
from batchllm.llm_outputs import CompletionOutput, OutputMaker, RequestOutput, text_of, warn_of_errors
from batchllm.llm_params import OF_MODEL, SamplingParams, params_of_model
from batchllm.planner.plan import PlanOptions
from batchllm.report.progress import Progress
from batchllm.scoring import Item, Score, TokenSpan, encode_all, mixed_table, pair_spans, windows
from batchllm.scoring import prefix_token as first_token
from batchllm.table_run import RunOptions, TableRun

ItemOfCall = TokenSpan | tuple[Sequence[int], core.SamplingParams | SamplingParams] | str
ParamsOfCall = (
    SamplingParams | Sequence[SamplingParams] | core.SamplingParams | Sequence[core.SamplingParams] | None
)


class LLM:
    """A model in memory. Raises ArgumentError (a ValueError) for a value that cannot be, TypeError for an argument of
    vLLM that has no counterpart, and ModelError when the model cannot be used or would not be exact.

    `seed` is mixed into the samples of calls whose parameters name no seed of their own; `max_model_len` is the most
    tokens of prompt and output together; `generation_config="vllm"` leaves out what the model says of sampling.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: Any = "auto",
        device: str = "auto",
        quantize: str | None = None,
        trust_remote_code: bool = False,
        kv_memory: int | str = "auto",
        max_step_tokens: int | str = "auto",
        min_shared_tokens: int | str = PlanOptions.min_shared_tokens,
        skip_tokenizer_init: bool = False,
        max_model_len: int | None = None,
        seed: int | None = 0,
        generation_config: str | None = "auto",
        **others: Any,
    ):
        ours = {
            "model": model,
            "dtype": dtype,
            "device": device,
            "quantize": quantize,
            "trust_remote_code": trust_remote_code,
            "kv_memory": kv_memory,
            "max_step_tokens": max_step_tokens,
            "min_shared_tokens": min_shared_tokens,
        }
        chosen, engine = sections_of(our_arguments(ours, others))
        self._uses_defaults_of_model = uses_defaults_of_model(generation_config)
        self._seed, self._calls = seed_of(seed), 0
        self._tokenizer, placement = _checked_files(chosen, engine, tokenizer, skip_tokenizer_init)
        self.device_note = (placement.note or "").removeprefix("engine.")  # what device="auto" could not have
        if self.device_note:
            warnings.warn(self.device_note, stacklevel=2)
        self._model = load_ready_model(
            chosen.path, chosen.dtype, chosen.trust_remote_code, placement, chosen.quantize
        )
        self._length = readable_length(self._model.max_length, max_model_len)
        shared = engine.min_shared_tokens
        shared = PlanOptions.min_shared_tokens if isinstance(shared, str) else shared
        plan = PlanOptions(shared, max_length=self._length)
        self._run_options = RunOptions(engine.kv_memory, engine.max_step_tokens, plan)
        said = self._model.model.generation_config
        notes = generation_notes(said, given=OF_MODEL, section="SamplingParams")
        for note in (missing_kernels_note(self._model), *notes):
            if note:
                warnings.warn(note, stacklevel=2)
        limits = ModelLimits.of(self._model.config, self._model.limit, said, self._tokenizer)
        self._limits = replace(limits, max_length=self._length)
        end_ids = end_of_sequence_ids(said, self._tokenizer)
        self._outputs = OutputMaker(StopRules(end_ids, self._tokenizer))
        self.last_run: TableRun | None = None  # of the last call: what it shared
        self.trace: StepTrace | None = None  # set it, and the steps of the calls that follow are recorded

    def get_tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def config(self) -> Any:
        """transformers' configuration of the model."""
        return self._model.config

    def get_default_sampling_params(self) -> SamplingParams:
        """Those of a call without parameters: vLLM's defaults, but for what the model's generation_config.json says."""
        said = self._model.model.generation_config if self._uses_defaults_of_model else None
        return params_of_model(said)

    def generate(
        self,
        prompts: str | Iterable[Any],
        sampling_params: ParamsOfCall = None,
        use_tqdm: bool = True,
        **others: Any,
    ) -> list[RequestOutput]:
        """Answers all prompts: texts, lists of token ids, or {"prompt": ...} / {"prompt_token_ids": ...}."""
        check_call("generate()", others)
        many = prompt_list(prompts)
        if self._tokenizer is None and any(text_of(prompt) is not None for prompt in many):
            raise ArgumentError("give token ids: the LLM was made with skip_tokenizer_init=True")
        table = prompts_from_list(many, self._params(sampling_params), self._tokenizer)
        outputs = self._answer(many, table, use_tqdm)
        warn_of_errors(outputs)
        return outputs

    def chat(
        self,
        messages: Iterable[Any],
        sampling_params: ParamsOfCall = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """`generate` for one conversation or a list of them, through the model's chat template.

        The model answers, or with `continue_final_message` goes on with the last message; `chat_template_kwargs` are
        what else the template takes, such as `enable_thinking`. Raises ArgumentError for arguments that no template
        can take; those that this one does not use are ignored, with a warning. A conversation that is wrong gives an
        output with `error` set, and the others are answered.
        """
        check_call("chat()", others)
        if self._tokenizer is None:
            raise ArgumentError("chat needs a tokenizer, and the LLM was made with skip_tokenizer_init=True")
        if isinstance(messages, str | Mapping):
            raise ArgumentError(
                "chat takes a list of messages, or a list of such lists; found text or a message"
            )
        many = list(messages)
        many = [many] if many and isinstance(many[0], Mapping) else many
        given = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message or None,
            "tools": list(tools) if isinstance(tools, tuple) else tools,
            "chat_template": chat_template,
        }
        args = dict(chat_template_kwargs or {}) | {k: v for k, v in given.items() if v is not None}
        texts = conversation_prompts(self._tokenizer, many, args)
        unused = unused_arg(self._tokenizer, args)
        if unused is not None:
            warnings.warn(f"ignored: {unused}", stacklevel=2)
        shown = [text.text if isinstance(text, Prompt) else "" for text in texts]
        table = prompts_from_list(texts, self._params(sampling_params), self._tokenizer)
        outputs = self._answer(shown, table, use_tqdm)
        warn_of_errors(outputs)
        return outputs

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
        self, items: Sequence[ItemOfCall], use_tqdm: bool = True
    ) -> tuple[list[Score], list[CompletionOutput]]:
        """Texts to score and prompts to continue, planned together and run once; an item that is text is the reason
        why there is none. Scores of the spans (and reasons) in order, first answers of the prompts in order."""
        found = dict(self.score_and_generate_each(items, use_tqdm))
        in_order = [found[number] for number in range(len(items))]
        scores = [part for part in in_order if isinstance(part, Score)]
        return scores, [part for part in in_order if isinstance(part, CompletionOutput)]

    def score_and_generate_each(
        self, items: Sequence[ItemOfCall], use_tqdm: bool = True
    ) -> Iterator[tuple[int, Score | CompletionOutput]]:
        """The same, as (number of the item, what came of it), each as soon as it is known."""
        table, scored = mixed_table(self._with_params(items), self._exact_length, self._model.vocab_size)
        self._check_needs_no_tokenizer(table)
        prompts = usable(table, self._limits, self._tokenizer, scored.first >= 0)
        requests = make_requests(prompts, None, b"")
        run = TableRun(self._model, self._tokenizer, prompts, requests, self._run_options, scored, self.trace)
        with Progress(quiet=not use_tqdm).stage("running", len(requests)) as stage:
            for known, answer in enumerate(run.results(), start=1):
                run.show(stage, known)
                if requests.sample[answer.request] == 0:
                    row = int(requests.row[answer.request])
                    yield row, self._part_of(items[row], answer, run, row)
        self.last_run = run

    def _part_of(
        self, item: ItemOfCall, answer: RequestResult, run: TableRun, row: int
    ) -> Score | CompletionOutput:
        """What came of an item, which is a row of the run."""
        if isinstance(item, tuple):
            return self._outputs.completion(answer, 0)
        if answer.error is not None or isinstance(item, str):
            return Score.failed(answer.error or str(item))
        return Score(tuple(item.tokens[item.first :]), *run.score(row))

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once and is exact for; 2048 where it does not say, as in
        lm-evaluation-harness."""
        return self._exact_length or 2048

    @property
    def _exact_length(self) -> int | None:
        return min(filter(None, (self._length, self._model.exact_length)), default=None)

    def _answer(self, many: list[Any], table: PromptTable, use_tqdm: bool) -> list[RequestOutput]:
        self._check_needs_no_tokenizer(table)
        prompts = usable(table, self._limits, self._tokenizer)
        requests = make_requests(prompts, None, b"")
        candidates = Candidates(prompts, requests, None, b"")
        none = np.zeros(len(requests), dtype=bool)
        answers: list[RequestResult | None] = [None] * len(requests)
        with Progress(quiet=not use_tqdm).stage("running", len(requests)) as stage:
            tables = (candidates.prompts, candidates.requests)
            run = TableRun(self._model, self._tokenizer, *tables, self._run_options, trace=self.trace)
            known = 0
            for found in run.results():
                for answer in candidates.settle([found], none):
                    answers[answer.request] = answer
                    known += 1
                run.show(stage, known)
        self.last_run = run
        return self._outputs.outputs(many, prompts, requests, answers)

    # ---- what parameters leave open

    def _params(self, given: ParamsOfCall) -> core.SamplingParams | list[core.SamplingParams]:
        """What the engine is given for all prompts of a call, or for each of them."""
        given = self.get_default_sampling_params() if given is None else given
        seed = drawn_seed(self._seed, self._calls)
        self._calls += 1
        if isinstance(given, Mapping) or not isinstance(given, Iterable):
            return self._resolved(given, seed)
        many = list(given)
        known = {id(one): one for one in many}
        resolved = {number: self._resolved(one, seed) for number, one in known.items()}
        return [resolved[id(one)] for one in many]

    def _resolved(self, given: object, seed: int) -> core.SamplingParams:
        if isinstance(given, core.SamplingParams):
            return given
        if not isinstance(given, SamplingParams):
            raise TypeError(f"sampling_params must be batchllm.SamplingParams, found {type(given).__name__}")
        if given.max_tokens is None and self._length is None:
            raise ArgumentError(
                "SamplingParams: max_tokens None is all that the model's length leaves, and this model states none; "
                "give max_tokens, or max_model_len to LLM"
            )
        return given.resolved(seed=seed, max_tokens=self._length or 1)

    def _with_params(self, items: Sequence[ItemOfCall]) -> list[Item]:
        given = [item[1] for item in items if isinstance(item, tuple)]
        resolved = iter(self._params(given) if given else [])  # type: ignore[arg-type]
        return [(item[0], next(resolved)) if isinstance(item, tuple) else item for item in items]

    def _check_needs_no_tokenizer(self, prompts: PromptTable) -> None:
        used = (params.bad_words or params.structure or params.stop for params in prompts.params)
        if self._tokenizer is None and any(used):
            raise ArgumentError("stop, bad_words, choice, regex, json_schema and grammar need a tokenizer")


def _checked_files(
    chosen: ModelSpec, engine: EngineSpec, tokenizer: str | None, skip_tokenizer: bool
) -> tuple[Any, Placement]:
    """The tokenizer, if any, and where the model will run. No weights are read before all that is cheap is known."""
    if chosen.quantize is not None:
        check_quantization(chosen.quantize)
    needs_its_own = tokenizer is None and not skip_tokenizer
    check_model_folder(chosen.path, chosen.trust_remote_code, need_tokenizer=needs_its_own)
    path, trust = str(tokenizer or chosen.path), chosen.trust_remote_code
    loaded = None if skip_tokenizer else load_tokenizer(path, trust)
    config, _ = load_config(chosen.path, trust)
    size = weight_bytes(config, chosen.dtype)
    return loaded, choose_device(engine.device, size, this_machine(), chosen.quantize)
