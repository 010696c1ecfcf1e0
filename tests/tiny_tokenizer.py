"""A byte-level tokenizer made on the spot: every byte a token, a few words as one token, and an end of text."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS = 256, 257
WORDS = ("th", "the", "an", "and")  # merges of the byte-level vocabulary
VOCABULARY = EOS + 1 + len(WORDS)
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Adds nothing to a text. Only `the` and `and` are more than one byte, and only when given as such a token:
    there are no merges, so a text is always its bytes."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<pad>": PAD, "<eos>": EOS}
    vocabulary |= {word: EOS + 1 + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
