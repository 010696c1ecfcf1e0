"""The tokenizer of the example model and the text format of its prompts.

A byte-level BPE tokenizer whose vocabulary is written down instead of learned: every word of the generator,
with its leading space, is one token, and every invented name is exactly two tokens, its first piece and its
second piece. Any other text is encoded through the byte alphabet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from generator import (
    FIRST_PIECES,
    INTRODUCTIONS,
    PERSON_ENDINGS,
    RELATIONS,
    SPEAKER,
    TOWN_ENDINGS,
    WORD_LISTS,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
SPACE = "Ġ"  # how the byte alphabet writes a space
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %} {% endif %}{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER_CONTENT = "{{ documents }}\nQuestion: {{ question }}"


def prefix_text(documents: str) -> str:
    """The part of a prompt that all questions about one document set share."""
    return f"{START}user\n{documents}\n"


def question_text(question: str) -> str:
    """The rest of the prompt; prefix_text + question_text is what the chat template renders."""
    return f"Question: {question}{END}\n{START}assistant\n"


def answer_text(answer: str) -> str:
    """The reply; it starts with a space so that its tokens are those of the same words in a passage."""
    return f" {answer}{END}"


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer; the result depends on the generator's word lists alone."""
    vocabulary: dict[str, int] = {}
    merges: dict[tuple[str, str], None] = {}  # an ordered set; earlier merges are applied first

    def add(token: str) -> None:
        vocabulary.setdefault(token, len(vocabulary))

    def add_piece(piece: str) -> None:
        for end in range(2, len(piece) + 1):
            merges.setdefault((piece[: end - 1], piece[end - 1]))
            add(piece[:end])

    for token in (PAD, START, END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *_words()):
        add(token)
    # A first piece starts with a space and town endings may contain other pieces, hence this order.
    for piece in (*(SPACE + first for first in FIRST_PIECES), *TOWN_ENDINGS, *PERSON_ENDINGS):
        add_piece(piece)
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), ignore_merges=True))
    pattern = Regex(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # A reply decodes without the space it starts with.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    )
    return tokenizer


def _words() -> Iterable[str]:
    """Every whole-word token: words of passages and questions, then the words that start a line."""
    texts = [SPEAKER, SPEAKER.capitalize(), *INTRODUCTIONS]
    for relation in RELATIONS.values():
        texts += [*relation.templates, relation.question, relation.link or ""]
    for words in WORD_LISTS.values():
        texts += words
    found = {word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", " ", text))}
    return [*(SPACE + word for word in sorted(found)), "Passage", "Question", "user", "assistant", "system"]
