"""The tokenizer of the example model and the text format of its prompts.

A byte-level BPE tokenizer trained on the generator's text; words are split off with their leading space. The
shipped one is ``model/tokenizer.json``, which training reads. To make another:

    python tokenizer.py other_tokenizer.json
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from generator import TaskShape, make_document_set
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %} {% endif %}{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHIPPED = Path(__file__).parent / "model" / "tokenizer.json"
VOCABULARY = 1024
NUM_TRAINING_SETS = 6000


def prefix_text(documents: str) -> str:
    """The part of a prompt that all questions about one document set share."""
    return f"{START}user\n{documents}\n"


def question_text(question: str) -> str:
    """The rest of the prompt; prefix_text + question_text is what the chat template renders."""
    return f"Question: {question}{END}\n{START}assistant\n"


def answer_text(answer: str) -> str:
    """The reply; it starts with a space so that its tokens are those of the same words in a passage."""
    return f" {answer}{END}"


def load_tokenizer(path: Path = SHIPPED) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """Train a tokenizer on passages, questions and answers with training names."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"'s| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = reply_decoder()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(seed), trainer)
    return tokenizer


def reply_decoder() -> decoders.Decoder:
    """Bytes to text, without the space that a reply starts with."""
    return decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])


def _training_texts(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    shape = TaskShape(passages=(2, 8), sentences=(3, 5), speaker_probability=0.5)
    for _ in range(NUM_TRAINING_SETS):
        made = make_document_set(rng, shape, held_out=False)
        pairs = [f"Question: {each.text}\nuser\nassistant\n {each.answer}\n" for each in made.questions]
        yield made.documents + "\n" + "".join(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tokenizer on the generator's text.")
    parser.add_argument("path", type=Path)
    train_tokenizer().save(str(parser.parse_args().path))


if __name__ == "__main__":
    main()
