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
    FIRST_PIECES,
    FULL_TASK,
    PERSON_ENDINGS,
    PERSON_RELATIONS,
    RELATIONS,
    TOWN_ENDINGS,
    DocumentSet,
    TaskShape,
    is_held_out,
    make_document_set,
)
from make_quickstart import quickstart_table  # noqa: E402
from network import Network, NetworkConfig  # noqa: E402
from tokenizer import answer_text, build_tokenizer, prefix_text, question_text  # noqa: E402

NAME = re.compile(rf"\b(?:{'|'.join(FIRST_PIECES)})(?:{'|'.join((*PERSON_ENDINGS, *TOWN_ENDINGS))})\b")
needs_model = pytest.mark.skipif(
    not (MODEL / "config.json").exists(), reason="no trained model in this checkout"
)


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
        for sentence in re.findall(r"[^.]+\.", passage.removeprefix("Passage: ")):
            sentence = sentence.strip()
            if match := re.fullmatch(r"The \w+ notes are spoken by (\w+)\.", sentence):
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


def parse_sentence(sentence: str) -> tuple[str, str, str]:
    for key, relation in RELATIONS.items():
        for template in relation.templates:
            start = template[0].upper() + template[1:] if not template.startswith("{") else template
            pattern = (
                re.escape(start).replace(r"\{s\}", r"([Tt]he speaker|[A-Z]\w+)").replace(r"\{v\}", r"(\w+)")
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
        names = set(NAME.findall(text))
        assert names
        assert all(is_held_out(name) == held_out for name in names)


def test_a_name_can_be_told_by_its_first_piece() -> None:
    split = re.compile(rf"({'|'.join(FIRST_PIECES)})(?:{'|'.join((*PERSON_ENDINGS, *TOWN_ENDINGS))})")
    for made in document_sets(100, held_out=True):
        firsts = [split.fullmatch(name)[1] for name in set(NAME.findall(made.documents))]
        assert len(firsts) == len(set(firsts))


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
                        answers[RELATIONS[key].question.format(s=link.format(s=start))] = value
        for question in made.questions:
            assert answers[question.text] == question.answer
            asked[question.kind] += 1
    assert min(asked.values()) > 100


def test_speakers_of_a_set_state_the_same_relations_with_different_values() -> None:
    for made in document_sets(100, held_out=True):
        speakers = {speaker for speaker in made.speakers if speaker}
        assert len(speakers) in (0, 2, 3)
        facts = stated_facts(made)
        for key in PERSON_RELATIONS:
            values = [facts[speaker, key] for speaker in speakers if (speaker, key) in facts]
            assert len(values) in (0, len(speakers))
            assert len(values) == len(set(values))


def test_every_name_is_two_tokens() -> None:
    tokenizer = build_tokenizer()
    for first in FIRST_PIECES:
        for ending in (*PERSON_ENDINGS, *TOWN_ENDINGS):
            assert tokenizer.encode(f" {first}{ending}").tokens == [f"Ġ{first}", ending]


def test_words_are_one_token_and_any_text_survives() -> None:
    tokenizer = build_tokenizer()
    for made in document_sets(50, held_out=False):
        words = len(re.findall(r"\w+|[^\w\s]|\n", made.documents))
        names = len(NAME.findall(made.documents))
        assert len(tokenizer.encode(made.documents).ids) == words + names
    for text in ("Grüße, naïve 漢字\t123 foo_bar!\n", "x  y\r\n\r\nz", "Passage: Badel lives in Kiburg."):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_row_is_the_same_as_separate_prompts() -> None:
    """Packed questions give the logits that each prompt with one question gives."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    maker = RowMaker(tokenizer)
    network = Network(NetworkConfig(tokenizer.get_vocab_size(), layers=2, width=32, heads=2, hidden=32))
    made = document_sets(1, held_out=False)[0]
    batch = collate([maker.question_row(made)], 0)
    with torch.no_grad():
        packed = network(batch.ids, batch.positions, batch.visible)[-1][0]
        for number, question in enumerate(made.questions, start=1):
            text = prefix_text(made.documents) + question_text(question.text) + answer_text(question.answer)
            ids = torch.tensor([maker.encode(text)])
            length = ids.shape[1]
            causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            alone = network(ids, torch.arange(length)[None], causal)[-1][0]
            own = batch.segments[0] == number
            torch.testing.assert_close(packed[own], alone[-int(own.sum()) :], atol=1e-4, rtol=1e-4)
            assert torch.equal(
                torch.cat([batch.ids[0][batch.segments[0] == PREFIX], batch.ids[0][own]]), ids[0]
            )


def test_hints_point_at_links_and_speakers() -> None:
    tokenizer = build_tokenizer()
    maker = RowMaker(tokenizer)
    made = next(made for made in document_sets(50, held_out=False) if any(made.speakers))
    row = maker.question_row(made)
    speakers = [maker.first_token(speaker) for speaker in made.speakers if speaker]
    assert list(dict.fromkeys(token for _, token in row.speaker_hints)) == speakers
    assert all(tokenizer.id_to_token(row.ids[at]) == "Ġspeaker" for at, _ in row.speaker_hints)
    two = [question for question in made.questions if question.kind == "two"]
    assert [token for _, token in row.bridge_hints] == [
        maker.first_token(question.bridge) for question in two
    ]
    for (at, _), question in zip(row.bridge_hints, two, strict=True):
        assert tokenizer.decode(row.ids[: at + 1]).endswith(question.link)


def test_quickstart_questions_are_what_the_generator_makes() -> None:
    polars = pytest.importorskip("polars")
    table = polars.read_parquet(QUICKSTART)
    assert table.equals(quickstart_table(num_rows=400, seed=2))
    assert table["id"].n_unique() == table.height
    assert table["id"].to_list() != sorted(table["id"])
    for row in table.iter_rows(named=True):
        assert "\n".join(row["passages"]) == row["documents"]
        assert all(is_held_out(name) for name in NAME.findall(row["documents"]))


@needs_model
def test_model_folder_is_small_and_in_step_with_the_code() -> None:
    from tokenizers import Tokenizer

    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 10_000_000
    shipped = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert shipped.get_vocab() == build_tokenizer().get_vocab()


@needs_model
def test_chat_template_renders_the_training_format() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    made = document_sets(1, held_out=True)[0]
    for question in made.questions:
        messages = [{"role": "user", "content": f"{made.documents}\nQuestion: {question.text}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == prefix_text(made.documents) + question_text(question.text)
        assert tokenizer(text).input_ids == build_tokenizer().encode(text).ids
        reply = build_tokenizer().encode(answer_text(question.answer)).ids
        assert tokenizer.decode(reply, skip_special_tokens=True) == question.answer


@needs_model
def test_model_answers_held_out_questions() -> None:
    from evaluate import exact_match, generate_answers, held_out_items
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    items = held_out_items(num_sets=6, seed=5)[:40]
    answers = generate_answers(model, AutoTokenizer.from_pretrained(MODEL), items)
    right, asked = exact_match(items, answers)["all"]
    assert asked == 40
    assert right >= 0.9 * asked
