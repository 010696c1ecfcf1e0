"""When a sequence ends and what text is left of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from batchllm.core import SamplingParams
from batchllm.executor.stopping import StopRules, end_of_sequence_ids
from tests.executor.tiny_models import configurations, make_model
from tests.tiny_tokenizer import EOS, VOCABULARY, byte_tokenizer

TOKENIZER = byte_tokenizer()
RULES = StopRules(frozenset([EOS]), TOKENIZER)


def tokens_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def run(tokens: list[int], limit: int = 100, **params: Any) -> tuple[int, str | None, str]:
    """Feeds tokens until they end: (how many were taken, why they ended, text)."""
    chosen = SamplingParams(max_tokens=limit, **params)
    for count in range(1, len(tokens) + 1):
        reason = RULES.finish_reason(tokens[:count], limit, chosen)
        if reason:
            return count, reason, RULES.text(tokens[:count], chosen)
    return len(tokens), None, RULES.text(tokens, chosen)


@pytest.mark.parametrize(
    ("stated", "of_tokenizer", "expected"),
    [
        (3, 9, {3}),
        ([3, 5], 9, {3, 5}),
        (None, 9, {9}),
        (None, None, set()),
        (0, 9, {0}),
    ],
)
def test_end_of_sequence_ids(stated: Any, of_tokenizer: int | None, expected: set[int]) -> None:
    tokenizer = SimpleNamespace(eos_token_id=of_tokenizer)
    assert end_of_sequence_ids(SimpleNamespace(eos_token_id=stated), tokenizer) == expected


def test_without_tokenizer_and_generation_config_nothing_ends_a_sequence_early() -> None:
    assert end_of_sequence_ids(None, None) == frozenset()


def test_end_of_sequence_ends_and_is_not_part_of_the_text() -> None:
    assert run([*tokens_of("yes"), EOS, *tokens_of("more")]) == (4, "stop", "yes")


def test_ignore_eos_goes_on_to_the_limit() -> None:
    tokens = [*tokens_of("yes"), EOS, *tokens_of("more")]
    assert run(tokens, limit=6, ignore_eos=True) == (6, "length", "yesmo")


def test_limit() -> None:
    assert run(tokens_of("abcdef"), limit=4) == (4, "length", "abcd")


def test_the_end_of_sequence_at_the_limit_is_a_stop() -> None:
    assert run([*tokens_of("abc"), EOS], limit=4) == (4, "stop", "abc")


def test_stop_token_ids() -> None:
    b = tokens_of("b")[0]
    assert run(tokens_of("aabaa"), stop_token_ids=(b,))[:2] == (3, "stop")
    assert run(tokens_of("aabaa"), stop_token_ids=(b,), ignore_eos=True)[:2] == (3, "stop")


def test_a_stop_string_over_many_tokens_is_cut_off() -> None:
    assert run(tokens_of("one two\n\nthree"), stop=("\n\n", "###")) == (9, "stop", "one two")


def test_a_stop_string_inside_one_token_cuts_what_follows_it() -> None:
    assert run([*tokens_of("so "), TOKENIZER.convert_tokens_to_ids("the")], stop=("h",)) == (
        4,
        "stop",
        "so t",
    )


def test_the_stop_string_that_comes_first_in_the_text_counts() -> None:
    long_token = TOKENIZER.convert_tokens_to_ids("the")
    assert run([*tokens_of("x"), long_token], stop=("e", "h")) == (2, "stop", "xt")


def test_a_stop_string_at_the_very_start_leaves_nothing() -> None:
    assert run(tokens_of("END of it"), stop=("END",)) == (3, "stop", "")


def test_no_stop_string_no_cut() -> None:
    assert run(tokens_of("almost EN D"), limit=11, stop=("END",)) == (11, "length", "almost EN D")


def test_a_stop_string_whose_characters_are_split_into_bytes() -> None:
    tokens = tokens_of("größe: 中文 end")
    count, reason, text = run(tokens, stop=("中文",))
    assert (reason, text) == ("stop", "größe: ")
    assert count == len("größe: 中文".encode())


def test_a_stop_string_is_found_after_a_long_output() -> None:
    tokens = tokens_of("word " * 500 + "### tail")
    count, reason, text = run(tokens, limit=10_000, stop=("###",))
    assert (count, reason, text) == (2503, "stop", "word " * 500)


def test_special_tokens_between_do_not_hide_a_stop_string() -> None:
    tokens = [*tokens_of("ab#"), EOS, *tokens_of("#cd")]
    assert run(tokens, stop=("##",), ignore_eos=True) == (5, "stop", "ab")


def test_same_tokens_as_generate_with_stop_strings() -> None:
    config = configurations()["llama"]
    config.vocab_size = VOCABULARY
    model = make_model(config, seed=3)
    random = torch.Generator().manual_seed(0)
    ended = 0
    for _ in range(20):
        prompt = torch.randint(4, VOCABULARY, (1, 9), generator=random)
        free = _generate(model, prompt)
        text = TOKENIZER.decode(free, skip_special_tokens=True)
        stops = tuple(stop for stop in (text[4:6], text[9:12]) if stop and "\ufffd" not in stop)
        if not stops:
            continue
        expected = _generate(model, prompt, stop_strings=list(stops), tokenizer=TOKENIZER)
        count, reason, ours = run(free, limit=len(free), stop=stops)
        assert free[:count] == expected
        assert reason == "stop"
        assert not any(stop in ours for stop in stops)
        ended += 1
    assert ended >= 4


def _generate(model: Any, prompt: torch.Tensor, **options: Any) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
    return output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("tokenizer", ["byte level", "byte fallback"])
def test_a_stop_string_of_a_character_that_min_tokens_divides(tokenizer: str) -> None:
    """Its first bytes come before `min_tokens`, where each may be shown as a character."""
    fallback = tokenizer == "byte fallback"
    rules = StopRules(frozenset([EOS]), byte_fallback_tokenizer() if fallback else TOKENIZER)
    tokens = list("ab中文".encode()) if fallback else tokens_of("ab中文")
    for begun in (1, 2):
        params = SamplingParams(max_tokens=50, min_tokens=3 + begun, stop=("中",))
        assert rules.finish_reason(tokens[:5], 50, params) == "stop"
        assert rules.text(tokens[:5], params) == "ab"
    late = SamplingParams(max_tokens=50, min_tokens=6, stop=("中",))
    assert rules.finish_reason(tokens[:6], 50, late) is None, "it was complete before min_tokens"
    assert rules.text(tokens, late) == "ab中文"


def byte_fallback_tokenizer() -> Any:
    """As SentencePiece's: bytes as tokens of their own, of which each is U+FFFD until a character is complete."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<eos>": EOS}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_what_ended_an_output() -> None:
    def reason(tokens: list[int], **params: Any) -> int | str | None:
        return RULES.stop_reason(tokens, SamplingParams(max_tokens=100, **params))

    written = tokens_of("one two")
    assert reason([*written, EOS], stop=("never",), stop_token_ids=(EOS,)) is None
    assert reason([*written, EOS], stop_token_ids=(EOS,), ignore_eos=True) == EOS
    assert reason(written, stop_token_ids=(7, written[-1])) == written[-1]
    assert reason(written, stop=("two", "o")) == "o"  # the first in the text
    assert reason(written, stop=("o", "two"), min_tokens=6) == "two"  # earlier ones did not end it
    assert reason(written, stop=("never",)) is None  # its structure was complete
