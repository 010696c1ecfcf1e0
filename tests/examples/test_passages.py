"""The example model: its data, its tokenizer, its training rows and the shipped folder."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "passages"
QUICKSTART = FOLDER.parent / "quickstart" / "questions.parquet"
MODEL = FOLDER / "model"
sys.path.insert(0, str(FOLDER))

from batches import PREFIX, RowMaker, collate  # noqa: E402
from generator import (  # noqa: E402
    FULL_TASK,
    INTRODUCTIONS,
    PERSON_RELATIONS,
    RELATIONS,
    VALUES,
    DocumentSet,
    TaskShape,
    is_held_out,
    make_document_set,
)
from make_quickstart import quickstart_table  # noqa: E402
from network import Network, NetworkConfig  # noqa: E402
from tokenizer import answer_text, load_tokenizer, prefix_text, question_text  # noqa: E402

TEMPLATES = [text for each in RELATIONS.values() for text in (*each.templates, each.question)]
FIXED_WORDS = {"Passage", "The", *re.findall(r"\b[A-Z]\w+", " ".join([*TEMPLATES, *INTRODUCTIONS]))}
needs_model = pytest.mark.skipif(
    not (MODEL / "config.json").exists(), reason="no trained model in this checkout"
)


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b[A-Z]\w+", text)) - FIXED_WORDS


def document_sets(
    count: int, *, held_out: bool, shape: TaskShape = FULL_TASK, seed: int = 0
) -> list[DocumentSet]:
    rng = random.Random(seed)
    return [make_document_set(rng, shape, held_out=held_out, max_per_kind=(9, 9, 9)) for _ in range(count)]


def stated_facts(made: DocumentSet) -> dict[tuple[str, str], str]:
    """(subject, relation) -> value, read back from the text of the passages alone."""
    facts = {}
    speaker = None
    for passage in made.passages:
        introduced = None
        for sentence in re.findall(r"[A-Z][^.]+\.", passage.removeprefix("Passage: ")):
            if match := introduction(sentence):
                introduced = match[1]
                continue
            subject, relation, value = parse_sentence(sentence)
            if subject.lower() == "the speaker":
                assert speaker is not None
                subject = speaker
            assert (subject, relation) not in facts
            facts[subject, relation] = value
        speaker = introduced
    return facts


def introduction(sentence: str) -> re.Match[str] | None:
    patterns = (re.escape(each).replace(r"\{s\}", r"(\w+)") for each in INTRODUCTIONS)
    return next((match for each in patterns if (match := re.fullmatch(each, sentence))), None)


def speakers_of(made: DocumentSet) -> set[str]:
    found = (introduction(each) for sentences in made.sentences for each in sentences)
    return {match[1] for match in found if match}


def parse_sentence(sentence: str) -> tuple[str, str, str]:
    for key, relation in RELATIONS.items():
        for template in relation.templates:
            start = template[0].upper() + template[1:] if not template.startswith("{") else template
            pattern = (
                re.escape(start)
                .replace(r"\{s\}", r"([Tt]he speaker|[A-Z]\w+)")
                .replace(r"\{v\}", r"([\w ]+)")
            )
            if match := re.fullmatch(pattern, sentence):
                return match[1], key, match[2]
    raise AssertionError(f"no template states {sentence!r}")


def test_generator_is_a_function_of_its_seed() -> None:
    assert document_sets(20, held_out=True) == document_sets(20, held_out=True)
    assert document_sets(20, held_out=True) != document_sets(20, held_out=True, seed=1)


@pytest.mark.parametrize("held_out", [True, False])
def test_names_stay_on_their_side_of_the_hold_out(held_out: bool) -> None:
    for made in document_sets(200, held_out=held_out):
        text = made.documents + "".join(f"\n{question.text} {question.answer}" for question in made.questions)
        names = names_in(text)
        assert names
        assert all(is_held_out(name) == held_out for name in names)


def test_answers_follow_from_the_passages() -> None:
    """A reader of the passages' text that knows the templates gives every gold answer."""
    links = {relation.link: key for key, relation in RELATIONS.items() if relation.link}
    asked = dict.fromkeys(("single", "two", "coref"), 0)
    for made in document_sets(100, held_out=True):
        facts = stated_facts(made)
        subjects = {subject for subject, _ in facts}
        answers = {}
        for (subject, key), value in facts.items():
            answers[RELATIONS[key].question.format(s=subject)] = value
            for link, first in links.items():
                for start in subjects:
                    if facts.get((start, first)) == subject:
                        answers[RELATIONS[key].question.format(s=link.format(s=start))] = (
                            f"{subject}, {value}"
                        )
        for question in made.questions:
            assert answers[question.text] == question.answer
            asked[question.kind] += 1
    assert min(asked.values()) > 100


def test_speakers_of_a_set_state_the_same_relations_with_different_values() -> None:
    for made in document_sets(100, held_out=True):
        speakers = speakers_of(made)
        assert len(speakers) in (0, 2, 3)
        facts = stated_facts(made)
        for key in PERSON_RELATIONS:
            values = [facts[speaker, key] for speaker in speakers if (speaker, key) in facts]
            assert len(values) in (0, len(speakers))
            assert len(values) == len(set(values))


@needs_model
def test_words_are_one_token_and_any_text_survives() -> None:
    tokenizer = load_tokenizer()
    words = {word for kind in VALUES for value in VALUES[kind] for word in value.split()}
    assert all(len(tokenizer.encode(f" {word}").ids) == 1 for word in words)
    for text in ("Grüße, naïve 漢字\t123 foo_bar!\n", "x  y\r\n\r\nz", "Passage: Bravi lives in Tuwick."):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@needs_model
def test_names_are_two_to_four_tokens_mostly() -> None:
    """The tokenizer was trained on training names; held-out ones must not fall apart into letters."""
    tokenizer = load_tokenizer()
    names = {name for made in document_sets(100, held_out=True) for name in names_in(made.documents)}
    lengths = [len(tokenizer.encode(f" {name}").ids) for name in names]
    assert min(lengths) >= 2
    assert sum(lengths) / len(lengths) < 4


@needs_model
def test_training_row_is_the_same_as_separate_prompts() -> None:
    """Packed questions give the logits that each prompt with one question gives."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    maker = RowMaker(tokenizer)
    network = Network(NetworkConfig(tokenizer.get_vocab_size(), layers=2, width=32, heads=2, hidden=32))
    made = document_sets(1, held_out=False)[0]
    batch = collate([maker.question_row(made)], 0)
    with torch.no_grad():
        packed = network(batch.ids, batch.positions, batch.visible)[0]
        for number, question in enumerate(made.questions, start=1):
            text = prefix_text(made.documents) + question_text(question.text) + answer_text(question.answer)
            ids = torch.tensor([maker.encode(text)])
            length = ids.shape[1]
            causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            alone = network(ids, torch.arange(length)[None], causal)[0]
            own = batch.segments[0] == number
            torch.testing.assert_close(packed[own], alone[-int(own.sum()) :], atol=1e-4, rtol=1e-4)
            assert torch.equal(
                torch.cat([batch.ids[0][batch.segments[0] == PREFIX], batch.ids[0][own]]), ids[0]
            )


def test_quickstart_questions_are_what_the_generator_makes() -> None:
    polars = pytest.importorskip("polars")
    table = polars.read_parquet(QUICKSTART)
    assert table.equals(quickstart_table(num_rows=400, seed=2))
    assert table["id"].n_unique() == table.height
    assert table["id"].to_list() != sorted(table["id"])
    for row in table.iter_rows(named=True):
        assert "\n".join(row["passages"]) == row["documents"]
        assert all(is_held_out(name) for name in names_in(row["documents"]))


@needs_model
def test_model_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 10_000_000


@needs_model
def test_chat_template_renders_the_training_format() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    made = document_sets(1, held_out=True)[0]
    for question in made.questions:
        messages = [{"role": "user", "content": f"{made.documents}\nQuestion: {question.text}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == prefix_text(made.documents) + question_text(question.text)
        assert tokenizer(text).input_ids == load_tokenizer().encode(text).ids
        reply = load_tokenizer().encode(answer_text(question.answer)).ids
        assert tokenizer.decode(reply, skip_special_tokens=True) == question.answer


@needs_model
def test_model_answers_held_out_questions() -> None:
    from evaluate import exact_match, generate_answers, held_out_items
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    items = held_out_items(num_sets=8, seed=5)[:40]
    answers = generate_answers(model, AutoTokenizer.from_pretrained(MODEL), items)
    right, asked = exact_match(items, answers)["all"]
    assert asked == 40
    assert right >= 0.9 * asked
