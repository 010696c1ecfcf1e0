"""Tokenising distinct lines once gives what the tokenizer gives for each whole text, or is not done at all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_tokenizers import PythonTokenizer, byte_tokenizer, phi_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from batchllm.dataset.encode import tokenize
from batchllm.dataset.line_encoder import line_encoder
from batchllm.dataset.prompts import Prompt

PHI = Path(__file__).parents[3] / "shared/data/tokenizers/phi-3-mini"
ATOMS = [
    *("\n", "\n\n", " ", "  ", "\t", "\r\n", "\x0b", "\u2028", "\xa0", "\x85", "\x1c", "▁", "<0x0A>"),
    *("<|end|>", "<|user|>", "</s>", "<s>", "<|endoftext|>", "<stop>", "<|", "|>"),
    *("a", "b", "ab", "aba", " ab", "é", "日本", "\U0001f600", ".", "1"),
]


def sentence_tokenizer(
    extra: tuple[str, ...] = (), as_normalizer: bool = False, **options: object
) -> PreTrainedTokenizerFast:
    """Of Llama 2's kind: merges over the whole text, bytes for what it does not know, `<s>` in front."""
    letters = ["▁", "a", "b", "ab", "▁a", "▁ab", "▁▁", *extra]
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, **options))
    if as_normalizer:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(
        ["<s>", "</s>", AddedToken("<stop>", rstrip=True, normalized=False, special=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentence_tokenizer_of_old() -> PreTrainedTokenizerFast:
    return sentence_tokenizer(as_normalizer=True)


def phi_tokenizer_from_its_file() -> PreTrainedTokenizerFast:
    """As it is loaded beside a Phi-3 configuration; without one it is rebuilt as Llama's."""
    phi_tokenizer()
    return PreTrainedTokenizerFast(tokenizer_file=str(PHI / "tokenizer.json"))


@pytest.mark.parametrize(
    "make", [sentence_tokenizer, sentence_tokenizer_of_old, phi_tokenizer, phi_tokenizer_from_its_file]
)
def test_equal_to_the_tokenizer_on_whole_texts(make):
    tokenizer = make()
    encoder = line_encoder(tokenizer)
    assert encoder is not None
    rng = random.Random(0)
    texts = ["".join(rng.choices(ATOMS, k=rng.randint(1, 14))) for _ in range(3000)]
    for special in (True, False):
        usual = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        for text, expected, found in zip(texts, usual, encoder.encode(texts, special)):
            assert found == expected, text


def test_tokenize_uses_it(monkeypatch):
    tokenizer = sentence_tokenizer()
    prompts = [Prompt("ab\nab", True), Prompt("ab\nab", False), Prompt("\ud800", True)]
    usual = tokenizer(["ab\nab"], add_special_tokens=True)["input_ids"][0]
    encoder = line_encoder(tokenizer)
    calls = []
    monkeypatch.setattr(
        type(encoder), "encode", lambda self, texts, special: calls.append(special) or [usual]
    )
    assert tokenize(tokenizer, prompts[:1]).ids == [usual]
    monkeypatch.undo()
    assert calls == [True]
    found = tokenize(tokenizer, prompts)
    assert found.ids[:2] == [usual, usual[1:]]
    assert list(found.faults) == [2]  # half a surrogate pair costs its row only


def test_a_line_is_tokenised_once():
    tokenizer = sentence_tokenizer()
    encoder = line_encoder(tokenizer)

    class Counting:
        def __init__(self, backend):
            self.backend, self.texts = backend, []

        def encode_batch_fast(self, texts, **options):
            self.texts += texts
            return self.backend.encode_batch_fast(texts, **options)

    encoder._backend = counting = Counting(encoder._backend)
    for _ in range(3):
        encoder.encode([f"aa\nshared b\nrow {index % 4}" for index in range(20)], True)
    assert sorted(counting.texts) == ["\nrow 0", "\nrow 1", "\nrow 2", "\nrow 3", "\nshared b\n", "aa\n"]


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_tokenizer(),
        PythonTokenizer(),
        sentence_tokenizer(extra=("a\n",)),
        sentence_tokenizer(extra=("<0x0A>a",)),
        sentence_tokenizer(dropout=0.1),
    ],
    ids=["byte level", "slow", "token with a line break", "token with the byte", "dropout"],
)
def test_other_tokenizers_are_left_alone(tokenizer):
    assert line_encoder(tokenizer) is None
    assert tokenize(tokenizer, [Prompt("\nc", True)]).ids[0] == tokenizer(["\nc"])["input_ids"][0]


def test_special_tokens_that_reach_across_lines_rule_it_out():
    for odd in (
        AddedToken("<x>", lstrip=True, normalized=False),
        AddedToken("<x\n>", normalized=False),
        AddedToken("<x>", single_word=True, normalized=False),
        AddedToken("<x>", normalized=True),
    ):
        tokenizer = sentence_tokenizer()
        tokenizer.backend_tokenizer.add_tokens([odd])
        assert line_encoder(tokenizer) is None
