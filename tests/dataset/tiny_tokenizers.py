"""Tokenizers made on the spot: every byte is a token, `<s>` is put before a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOS = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{% if shout %}!{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A fast tokenizer. Token ids 0 to 255 stand for bytes in the order of the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<s>": BOS}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.chat_template = chat_template
    return fast


class PythonTokenizer:
    """A slow tokenizer of its own kind: code points, one text after the other, and it refuses `\\x00`."""

    chat_template = None

    def __call__(
        self, texts: list[str], add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[list[int]]]:
        if any("\x00" in text for text in texts):
            raise RuntimeError("no zeros\nplease")
        start = [1] if add_special_tokens else []
        return {"input_ids": [start + [ord(letter) for letter in text] for text in texts]}


def phi_tokenizer() -> Any:
    """The tokenizer of phi-3-mini from the shared data; the test is skipped where there is none."""
    path = Path(__file__).parents[3] / "shared/data/tokenizers/phi-3-mini"
    if not path.is_dir():
        pytest.skip("there is no ../shared/data/tokenizers/phi-3-mini beside the repository")
    return AutoTokenizer.from_pretrained(path)
