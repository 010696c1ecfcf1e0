"""Synthetic document sets: short passages about invented people, towns and rivers, with questions about them.

A document set is 3 to 6 passages. Three kinds of question are asked:

* ``single``: the fact is stated in one sentence ("Where does Bravi live?");
* ``two``: the answer needs two facts from two different passages ("Where does the mentor of Bravi live?");
  it gives both, the intermediate name first ("Thodrujol, Vabek");
* ``coref``: a passage ends "The next notes are spoken by Bravi." and the next passage states facts about
  "the speaker"; the question names Bravi. Two or three speakers of one set state the same relations, so
  a reader that has not connected a note with its speaker can only guess.

Names are random syllables. One fifth of all names, chosen by checksum, is held out: a held-out document set
uses only held-out names and a training document set uses none of them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

KINDS = ("single", "two", "coref")

_ONSETS = "b d f g h j k l m n p r s t v z br dr kr st th sh gl"
ONSETS = tuple(_ONSETS.split())
VOWELS = "aeiou"
PERSON_ENDINGS = ("", "", "", "n", "l", "k", "r", "s", "m")
TOWN_ENDINGS = ("bek", "ton", "mere", "dal", "burg", "wick", "ford", "holm")
RIVER_ENDINGS = ("ov", "ash", "enna", "ith")

_LOOKS = "red blue green black white old tiny heavy golden silver wooden broken purple round striped yellow"
_THINGS = (
    "lamp cup clock kite drum boat ladder mirror basket violin carpet bell hammer compass kettle umbrella "
    "lantern chair telescope statue wagon ring"
)
_WORDS = {
    "job": "baker teacher pilot farmer doctor painter tailor miner sailor lawyer gardener plumber judge "
    "dancer chemist printer butcher librarian",
    "food": "soup bread cheese plums rice noodles honey fish apples beans cake mushrooms carrots walnuts "
    "pears olives",
    "music": "flute harp piano guitar trumpet cello banjo organ fiddle accordion",
    "goods": "wool salt glass silk paper pottery copper wine clocks candles boots roses marble rope",
}
VALUES = {kind: tuple(words.split()) for kind, words in _WORDS.items()}
VALUES["thing"] = tuple(f"{look} {thing}" for look in _LOOKS.split() for thing in _THINGS.split())


@dataclass(frozen=True)
class Relation:
    """A relation of a subject to a value.

    ``templates`` state the fact ({s} subject, {v} value) and ``question`` asks for the value. ``link`` is a
    noun phrase for the value; a relation that has one can be the first step of a ``two`` question.
    """

    value_kind: str
    templates: tuple[str, ...]
    question: str
    link: str | None = None


PERSON_RELATIONS = {
    "home": Relation(
        "town",
        ("{s} lives in {v}.", "{s} has a house in {v}."),
        "Where does {s} live?",
        "the town where {s} lives",
    ),
    "birth": Relation(
        "town", ("{s} was born in {v}.",), "Where was {s} born?", "the town where {s} was born"
    ),
    "thing": Relation("thing", ("{s} owns a {v}.", "{s} keeps a {v}."), "What does {s} own?"),
    "job": Relation("job", ("{s} works as a {v}.", "{s} is a {v}."), "What is the job of {s}?"),
    "food": Relation("food", ("{s} likes to eat {v}.",), "What does {s} like to eat?"),
    "music": Relation("music", ("{s} plays the {v}.",), "What does {s} play?"),
    "mentor": Relation(
        "person",
        ("{s}'s mentor is {v}.", "The mentor of {s} is {v}."),
        "Who is the mentor of {s}?",
        "the mentor of {s}",
    ),
    "friend": Relation(
        "person",
        ("{s}'s best friend is {v}.",),
        "Who is the best friend of {s}?",
        "the best friend of {s}",
    ),
    "sister": Relation("person", ("{s}'s sister is {v}.",), "Who is the sister of {s}?", "the sister of {s}"),
}
TOWN_RELATIONS = {
    "mayor": Relation("person", ("The mayor of {s} is {v}.",), "Who is the mayor of {s}?"),
    "goods": Relation(
        "goods", ("{s} is known for its {v}.", "{s} is famous for its {v}."), "What is {s} known for?"
    ),
    "river": Relation("river", ("{s} lies on the river {v}.",), "On which river does {s} lie?"),
}
RELATIONS = PERSON_RELATIONS | TOWN_RELATIONS
INTRODUCTIONS = (
    "The speaker in the following notes is {s}.",
    "The next notes are spoken by {s}.",
    "From here on the speaker is {s}.",
)
SPEAKER = "the speaker"


@dataclass(frozen=True)
class TaskShape:
    """How large a document set is; both ends of every range are included."""

    passages: tuple[int, int]
    sentences: tuple[int, int]
    speaker_probability: float


FULL_TASK = TaskShape(passages=(3, 6), sentences=(2, 4), speaker_probability=0.65)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class DocumentSet:
    sentences: tuple[tuple[str, ...], ...]  # of each passage
    questions: tuple[Question, ...]

    @property
    def passages(self) -> tuple[str, ...]:
        return tuple("Passage: " + " ".join(sentences) for sentences in self.sentences)

    @property
    def documents(self) -> str:
        """The passages as the prompt shows them."""
        return "\n".join(self.passages)


def is_held_out(name: str) -> bool:
    """Whether a name is reserved for evaluation."""
    return zlib.crc32(name.encode()) % 5 == 0


def make_name(rng: random.Random, kind: str) -> str:
    """A name for a person, a town or a river."""

    def syllable() -> str:
        return rng.choice(ONSETS) + rng.choice(VOWELS)

    if kind == "person":
        name = "".join(syllable() for _ in range(2 if rng.random() < 0.8 else 3)) + rng.choice(PERSON_ENDINGS)
    elif kind == "town":
        middle = syllable() if rng.random() < 0.4 else rng.choice(PERSON_ENDINGS)
        name = syllable() + middle + rng.choice(TOWN_ENDINGS)
    else:
        name = syllable() + rng.choice(ONSETS[:16]) + rng.choice(RIVER_ENDINGS)
    return name.capitalize()


@dataclass
class _World:
    """The facts of one document set while it is being made."""

    rng: random.Random
    held_out: bool
    used: set[str] = field(default_factory=set)
    facts: dict[tuple[str, str], str] = field(default_factory=dict)
    passage_of: dict[str, int] = field(default_factory=dict)
    kind_of: dict[str, str] = field(default_factory=dict)

    def new_name(self, kind: str) -> str:
        """A name on the right side of the hold-out that this world does not use yet."""
        while True:
            name = make_name(self.rng, kind)
            if is_held_out(name) == self.held_out and name not in self.used:
                self.used.add(name)
                return name

    def new_value(self, kind: str) -> str:
        return self.rng.choice(VALUES[kind]) if kind in VALUES else self.new_name(kind)

    def subjects(self, kind: str) -> list[str]:
        return [name for name, its_kind in self.kind_of.items() if its_kind == kind]


def make_document_set(
    rng: random.Random,
    shape: TaskShape = FULL_TASK,
    *,
    held_out: bool,
    max_per_kind: Sequence[int] = (4, 4, 4),
) -> DocumentSet:
    """Make a document set with at most ``max_per_kind`` questions of each of KINDS, in random order.

    The result is a function of the state of ``rng`` and the arguments alone.
    """
    world = _World(rng, held_out)
    num_passages = rng.randint(*shape.passages)
    num_speakers = _draw_num_speakers(rng, num_passages, shape.speaker_probability)
    num_plain = num_passages - num_speakers
    plain = _plain_passages(world, num_plain, shape)
    single_facts = list(world.facts)
    notes = _speaker_notes(world, num_speakers, shape)
    coref_facts = [key for key in world.facts if key[0] in notes]
    sentences = tuple(tuple(passage) for passage in _arrange(rng, plain, notes))
    pools = (
        [_single_question(world, key, "single") for key in single_facts],
        _two_questions(world, single_facts),
        [_single_question(world, key, "coref") for key in coref_facts],
    )
    questions = [
        q for pool, limit in zip(pools, max_per_kind) for q in rng.sample(pool, min(limit, len(pool)))
    ]
    rng.shuffle(questions)
    return DocumentSet(sentences, tuple(questions))


def _draw_num_speakers(rng: random.Random, num_passages: int, probability: float) -> int:
    if num_passages < 4 or rng.random() >= probability:
        return 0
    return 3 if num_passages >= 6 and rng.random() < 0.6 else 2


def _plain_passages(world: _World, num_plain: int, shape: TaskShape) -> list[list[str]]:
    """The sentences of each plain passage; fills in the world's facts."""
    rng = world.rng
    subjects: list[list[str]] = []
    for index in range(num_plain):
        kind = "town" if index > 0 and rng.random() < 0.3 else "person"
        subjects.append([world.new_name(kind)])
        world.kind_of[subjects[-1][0]] = kind
        if rng.random() < 0.35:
            subjects[-1].append(world.new_name("person"))
            world.kind_of[subjects[-1][1]] = "person"
        for name in subjects[-1]:
            world.passage_of[name] = index
    passages = []
    for names in subjects:
        num_sentences = max(rng.randint(*shape.sentences), len(names))
        shares = (
            [num_sentences] if len(names) == 1 else [num_sentences // 2, num_sentences - num_sentences // 2]
        )
        sentences = [fact for name, share in zip(names, shares) for fact in _state_facts(world, name, share)]
        rng.shuffle(sentences)
        passages.append(sentences)
    rng.shuffle(passages)
    return passages


def _state_facts(world: _World, name: str, count: int) -> list[str]:
    """Add up to ``count`` facts about a subject, most of them linked to other subjects, and state them."""
    rng = world.rng
    relations = dict(TOWN_RELATIONS if world.kind_of[name] == "town" else PERSON_RELATIONS)
    keys = list(relations)
    rng.shuffle(keys)
    if rng.random() < 0.6:
        keys.sort(key=lambda key: relations[key].link is None)
        keys[1:] = rng.sample(keys[1:], len(keys) - 1)
    sentences = []
    for key in keys[:count]:
        kind = relations[key].value_kind
        others = [other for other in world.subjects(kind) if other != name]
        linked = bool(others) and rng.random() < 0.75
        value = rng.choice(others) if linked else world.new_value(kind)
        world.facts[name, key] = value
        sentences.append(_sentence(rng, key, name, value))
    return sentences


def _speaker_notes(world: _World, num_speakers: int, shape: TaskShape) -> dict[str, list[str]]:
    """The notes of each speaker; all speakers state the same relations, with different values."""
    rng = world.rng
    keys = rng.sample(list(PERSON_RELATIONS), rng.randint(*shape.sentences))
    speakers = [world.new_name("person") for _ in range(num_speakers)]
    for key in keys:
        kind = PERSON_RELATIONS[key].value_kind
        values = rng.sample(VALUES[kind], num_speakers) if kind in VALUES else None
        for index, name in enumerate(speakers):
            world.facts[name, key] = values[index] if values else world.new_name(kind)
    notes = {}
    for name in speakers:
        order = rng.sample(keys, len(keys))
        notes[name] = [_sentence(rng, key, SPEAKER, world.facts[name, key]) for key in order]
    return notes


def _arrange(rng: random.Random, plain: list[list[str]], notes: dict[str, list[str]]) -> list[list[str]]:
    """Put each speaker's notes right after a plain passage that ends with the speaker's introduction."""
    speaker_after = dict(zip(rng.sample(range(len(plain)), len(notes)), notes))
    passages = []
    for index, sentences in enumerate(plain):
        speaker = speaker_after.get(index)
        if speaker is None:
            passages.append(sentences)
        else:
            introduction = rng.choice(INTRODUCTIONS).format(s=speaker)
            passages += [[*sentences, introduction], notes[speaker]]
    return passages


def _sentence(rng: random.Random, key: str, subject: str, value: str) -> str:
    text = rng.choice(RELATIONS[key].templates).format(s=subject, v=value)
    return text[0].upper() + text[1:]


def _single_question(world: _World, key: tuple[str, str], kind: str) -> Question:
    name, relation = key
    return Question(kind, RELATIONS[relation].question.format(s=name), world.facts[key])


def _two_questions(world: _World, facts: list[tuple[str, str]]) -> list[Question]:
    """Every question that follows a link to a subject of another passage and asks for a fact stated there."""
    questions = []
    for name, first in facts:
        bridge, template = world.facts[name, first], RELATIONS[first].link
        if template is None or world.passage_of.get(bridge, world.passage_of[name]) == world.passage_of[name]:
            continue
        link = template.format(s=name)
        for subject, second in facts:
            answer = world.facts[subject, second]
            if subject == bridge and answer != name:
                text = RELATIONS[second].question.format(s=link)
                questions.append(Question("two", text, f"{bridge}, {answer}"))
    return questions
