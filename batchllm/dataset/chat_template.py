"""A model's chat template: from a conversation to the text of a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from batchllm.dataset.rows import RowFault
from batchllm.errors import first_line
from batchllm.suggest import nearest

# Arguments that every template has: those that choose or cut the template, and how it ends.
_ALWAYS = frozenset({"chat_template", "add_generation_prompt", "continue_final_message"})
_NOT_OF_THE_MODEL = frozenset({"system", "developer", "user", "tool"})


class ChatTemplate:
    """`own`: a template, or the name of one of the tokenizer's, that stands for the tokenizer's."""

    def __init__(self, tokenizer: Any, own: object = None) -> None:
        self._tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        self.exists = bool(template or own)
        texts = [*template.values()] if isinstance(template, Mapping) else [template]
        self._words = _words(*texts, own)

    def unknown(self, args: Iterable[str], own: object = None) -> str | None:
        """A sentence about the first of these arguments that the template never mentions, or None.

        The template would ignore it: tools that the model never sees, or a switch with a slip in its name.
        """
        words = self._words | _words(own)
        name = next((name for name in args if name not in _ALWAYS and name not in words), None)
        if name is None:
            return None
        match = nearest(name, words)
        return f"the model's chat template does not use `{name}`; " + (
            f"did you mean `{match}`?" if match else "remove it"
        )

    def render(self, messages: list[dict[str, Any]], args: Mapping[str, Any]) -> str | RowFault:
        """The text of messages as `clean_messages` gives them. `args` are complete (`chat_args.with_defaults`)."""
        role = messages[-1]["role"]
        if args.get("continue_final_message") and role in _NOT_OF_THE_MODEL:
            return RowFault(
                f"continue_final_message needs a last message of the model, found one of role {role}"
            )
        try:
            return str(self._tokenizer.apply_chat_template(messages, **args, tokenize=False))
        except Exception as error:  # a chat template refuses what it does not like, each in its own way
            if "final message does not appear" in str(error):
                return RowFault(
                    "continue_final_message: the chat template leaves out or changes some of the last message "
                    "(most drop its reasoning), so that it cannot be continued"
                )
            return RowFault(f"chat template: {first_line(error)}")


def _words(*texts: object) -> frozenset[str]:
    return frozenset(re.findall(r"[A-Za-z_]\w*", "\n".join(text for text in texts if isinstance(text, str))))
