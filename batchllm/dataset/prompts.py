"""From the rows of a batch to prompt texts, as the job's `prompt` section says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from batchllm.dataset.chat_args import ChatArgs, with_defaults, wrong_args
from batchllm.dataset.chat_template import ChatTemplate
from batchllm.dataset.chunk_marks import Span, with_marks, without_marks
from batchllm.dataset.messages import clean_messages, parse_messages, without_nulls
from batchllm.dataset.reorder import FreePart, is_list
from batchllm.dataset.rows import EMPTY_PROMPT, RowFault
from batchllm.dataset.templates import RowTemplate
from batchllm.dataset.values import is_text, python_values
from batchllm.errors import ArgumentError, JobError, ModelError
from batchllm.job import PromptSpec
from batchllm.planner.field_order import FieldOrder
from batchllm.suggest import column_hint

Values = dict[str, object]


class Prompt(NamedTuple):
    text: str
    add_special_tokens: bool  # False for a conversation: its chat template has written them
    chunks: tuple[Span, ...] | None = None  # characters of each chunk; None: the job has no chunks


def prompt_of(text: str | RowFault, add_special_tokens: bool) -> Prompt | RowFault:
    """The prompt that a text is, unless there is none."""
    if isinstance(text, RowFault):
        return text
    return Prompt(text, add_special_tokens) if text else EMPTY_PROMPT


class PromptRenderer:
    """Renders batches whose columns include `columns`. Raises JobError or ModelError when made, never later."""

    def __init__(
        self,
        prompt: PromptSpec,
        tokenizer: Any,
        schema: pa.Schema,
        source: str = "job",
        chunk_column: str | None = None,
    ) -> None:
        self._plan = PromptPlan(prompt, schema, source, chunk_column)
        self._chunks = chunk_column
        own = prompt.template_args.get("chat_template")
        self._template = ChatTemplate(tokenizer, own)
        self._ignores_unknown = prompt.unknown_template_args == "ignore"
        if self._plan.is_chat and not self._template.exists:
            key = "prompt.messages" if prompt.messages else "prompt.column"
            raise ModelError(
                f"{source}: {key} needs a chat template and the model's tokenizer has none; "
                f"write the prompt with prompt.text, or give prompt.template_args.chat_template"
            )
        named = (
            self._plan.chat_args.names_of_job() if self._template.exists and not isinstance(own, dict) else []
        )
        unknown = self._unknown(named)
        if unknown is not None:
            raise JobError(f"{source}: prompt.template_args: {unknown}")
        self.columns = self._plan.columns
        self.free = self._plan.free

    def render(
        self, batch: pa.RecordBatch, order: FieldOrder | None = None, first_row: int = 0
    ) -> list[Prompt | RowFault]:
        """One prompt or fault per row. `order` is of all rows of the input; the batch begins at `first_row`."""
        rows = enumerate(self._plan.row_values(batch), start=first_row)
        if self.free is None:
            return [self._prompt(self._marked(values)) for _, values in rows]
        return [
            self._prompt(self._marked(self._arranged(values, order.of(row) if order else None)))
            for row, values in rows
        ]

    def _marked(self, values: Values | RowFault) -> Values | RowFault:
        if self._chunks is None or isinstance(values, RowFault):
            return values
        marked = with_marks(values[self._chunks], self._chunks)
        return marked if isinstance(marked, RowFault) else {**values, self._chunks: marked}

    def _arranged(self, values: Values | RowFault, positions: list[int] | None) -> Values | RowFault:
        if isinstance(values, RowFault) or self.free is None:
            return values
        return self.free.arranged(values, positions)

    def _prompt(self, values: Values | RowFault) -> Prompt | RowFault:
        if isinstance(values, RowFault):
            return values
        content = self._plan.content(values)
        if isinstance(content, RowFault):
            return content
        is_chat = isinstance(content, list)
        text = self._chat(content, values) if isinstance(content, list) else content
        if isinstance(text, RowFault):
            return text
        if self._chunks is None or not text:
            return prompt_of(text, not is_chat)
        found = without_marks(text, self._chunks)
        return found if isinstance(found, RowFault) else Prompt(found[0], not is_chat, found[1])

    def _chat(self, messages: list[Any], values: Values) -> str | RowFault:
        if not self._template.exists:
            return RowFault("the model's tokenizer has no chat template")
        cleaned = clean_messages(messages)
        if isinstance(cleaned, RowFault):
            return self._plan.in_column(cleaned)
        args = self._plan.chat_args.of(values)
        if isinstance(args, RowFault):
            return args
        column = self._plan.chat_args.column_of_all
        unknown = self._unknown(args, args.get("chat_template")) if column else None
        if unknown is not None:
            return RowFault(f"column `{column}`: {unknown}")
        return self._template.render(cleaned, args)

    def _unknown(self, args: Iterable[str], own: object = None) -> str | None:
        return None if self._ignores_unknown else self._template.unknown(args, own)


def conversation_prompts(
    tokenizer: Any, conversations: Sequence[Any], args: Mapping[str, Any]
) -> list[Prompt | RowFault]:
    """One prompt or fault per conversation in memory. Raises ArgumentError for arguments that no template can take;
    those that this one does not use are for `unused_arg` to name."""
    template = ChatTemplate(tokenizer, args.get("chat_template"))
    if not template.exists:
        raise ArgumentError("the model's tokenizer has no chat template; give chat_template, or use generate")
    args = {name: value for name, value in args.items() if value is not None}
    wrong = wrong_args(args)
    if wrong is not None:
        raise ArgumentError(wrong)
    texts = []
    for messages in conversations:
        is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
        found = (
            clean_messages(list(messages)) if is_list else RowFault("a conversation is a list of messages")
        )
        texts.append(found if isinstance(found, RowFault) else template.render(found, with_defaults(args)))
    return [prompt_of(text, add_special_tokens=False) for text in texts]


def unused_arg(tokenizer: Any, args: Mapping[str, Any]) -> str | None:
    """A sentence about the first argument that the chat template does not use, or None."""
    given = [name for name, value in args.items() if value is not None]
    return ChatTemplate(tokenizer, args.get("chat_template")).unknown(given)


class PromptPlan:
    """What a `prompt` section reads and makes of a row: a text, or a conversation. Knows no tokenizer."""

    def __init__(
        self, prompt: PromptSpec, schema: pa.Schema, source: str, chunk_column: str | None = None
    ) -> None:
        self.chat_args = ChatArgs(prompt.template_args, schema.names, source)
        self._column = prompt.column
        self._roles: list[str] | None = None
        self._templates: list[RowTemplate] = []
        self.free: FreePart | None = None
        self.is_chat = prompt.messages is not None
        if prompt.column is not None:
            if chunk_column is not None:
                raise JobError(
                    f"{source}: chunks need a template that shows them: give prompt.text or prompt.messages "
                    "instead of prompt.column"
                )
            self.is_chat = _is_conversation(prompt.column, schema, f"{source}: prompt.column")
            self.columns: tuple[str, ...] = tuple(sorted({prompt.column} | self.chat_args.columns))
            self._nullable: frozenset[str] = frozenset(self.chat_args.columns - {prompt.column})
            return
        names: list[str] = schema.names
        if prompt.reorder is not None:
            self.free = FreePart(prompt.reorder, schema, f"{source}: prompt.reorder")
            names = self.free.names(names)
        if prompt.messages is None:
            self._templates = [RowTemplate(prompt.text or "", names, f"{source}: prompt.text")]
        else:
            self._roles = [message.role for message in prompt.messages]
            self._templates = [
                RowTemplate(message.content, names, f"{source}: prompt.messages[{number}].content")
                for number, message in enumerate(prompt.messages)
            ]
        used = {name for template in self._templates for name in template.columns}
        if self.free is not None:
            self.free.find_in(self._templates)
            used = (used - {self.free.name}) | set(self.free.columns)
        self.columns = tuple(sorted(used | self.chat_args.columns))
        self._nullable = _nullable(self._templates) | (self.chat_args.columns - used)
        if chunk_column is not None:
            _check_chunks(chunk_column, schema, used, f"{source}: chunks.column")

    def columns_in_order(self) -> list[str]:
        """The columns of the templates as they are first shown."""
        names: list[str] = []
        for template in self._templates:
            number_before = {name: len(template.used_before(name)[0]) for name in template.columns}
            names += sorted(template.columns, key=lambda name: number_before[name])
        return list(dict.fromkeys(names))

    def row_values(self, batch: pa.RecordBatch) -> Iterator[Values | RowFault]:
        """The values of `columns` of each row, or the first fault among them."""
        if not self.columns:
            yield from ({} for _ in range(batch.num_rows))
            return
        values = [python_values(batch.column(name), name, name in self._nullable) for name in self.columns]
        for row in zip(*values):
            fault = next((value for value in row if isinstance(value, RowFault)), None)
            yield dict(zip(self.columns, row)) if fault is None else fault

    def in_column(self, fault: RowFault) -> RowFault:
        """A fault of a conversation, with the column that holds it, if one does."""
        return fault if self._column is None else RowFault(f"column `{self._column}`: {fault.reason}")

    def content(self, values: Values) -> str | list[Any] | RowFault:
        """A text to send as it is, or a list of messages."""
        if self._column is not None:
            value = values[self._column]
            if isinstance(value, list):
                return list(without_nulls(value))
            messages = parse_messages(str(value))
            if isinstance(messages, RowFault):
                return self.in_column(messages)
            return str(value) if messages is None else messages
        texts = [template.render(values) for template in self._templates]
        fault = next((text for text in texts if isinstance(text, RowFault)), None)
        if fault is not None:
            return fault
        if self._roles is None:
            return texts[0]
        return [{"role": role, "content": text} for role, text in zip(self._roles, texts)]


def _is_conversation(column: str, schema: pa.Schema, where: str) -> bool:
    """Whether the column holds lists of messages. Text is decided row by row: it may be such a list in JSON."""
    if column not in schema.names:
        raise JobError(f"{where}: there is no column `{column}`; {column_hint(column, schema.names)}")
    type_ = schema.field(column).type
    if is_text(type_) or pa.types.is_null(type_):
        return False
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_)
    if is_list and pa.types.is_struct(type_.value_type):
        names = {field.name for field in type_.value_type}
        if {"role", "content"} <= names:
            return True
    raise JobError(f"{where}: `{column}` holds {type_}, and a prompt is text or a list of {{role, content}}")


def _check_chunks(column: str, schema: pa.Schema, used: set[str], where: str) -> None:
    if column not in schema.names:
        raise JobError(f"{where}: there is no column `{column}`; {column_hint(column, schema.names)}")
    type_ = schema.field(column).type
    if not (is_list(type_) or pa.types.is_null(type_)):
        raise JobError(f"{where}: `{column}` holds {type_}, and chunks are the elements of a list")
    if column not in used:
        raise JobError(f"{where}: no template uses `{column}`; show its elements in the prompt")


def _nullable(templates: Sequence[RowTemplate]) -> frozenset[str]:
    """Columns that may be null: every template that reads one is prepared for it."""
    reads_unprepared = {
        name for template in templates for name in template.columns if name not in template.nullable
    }
    return frozenset(name for template in templates for name in template.nullable) - reads_unprepared
