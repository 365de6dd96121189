"""A small preference dataset that teaches itself: short right answers beat wrong or padded ones.

Seven families of questions, each with several phrasings. The chosen answer is right and to the
point. The rejected answer is either *wrong* (the same sentence, another value) or *padded* (the
right sentence wrapped in waffle), so neither length nor wording alone tells the two apart.
Everything follows from the seed, and no held-out prompt is ever in the training set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Literal

Kind = Literal["wrong", "padded"]
Message = dict[str, str]
Row = dict[str, list[Message]]

TRAIN_PER_FAMILY, TEST_PER_FAMILY = 320, 36
PADDED_SHARE = 0.4
"""Share of the pairs whose rejected answer is padded rather than wrong."""


@dataclass(frozen=True)
class Pair:
    """One question with its better and its worse answer, as plain text."""

    family: str
    kind: Kind
    prompt: str
    chosen: str
    rejected: str

    def row(self) -> Row:
        """The pair as a row of the dataset: three columns of chat messages."""
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }


@dataclass(frozen=True)
class Question:
    """A prompt, the right sentence and sentences of the same form that are wrong."""

    prompt: str
    right: str
    wrong: tuple[str, ...]


OPPOSITES = """hot cold|big small|fast slow|up down|open closed|early late|full empty|happy sad
hard soft|light dark|new old|near far|rich poor|strong weak|wet dry"""

PLURALS = """cat cats|dog dogs|house houses|box boxes|bus buses|city cities|baby babies
child children|mouse mice|foot feet|tooth teeth|goose geese|man men|woman women|leaf leaves
knife knives|wolf wolves|tomato tomatoes|church churches|story stories|person people|ox oxen
tree trees|book books|key keys"""

CAPITALS = """France Paris|Italy Rome|Spain Madrid|Germany Berlin|Japan Tokyo|Egypt Cairo|Peru Lima
Kenya Nairobi|Canada Ottawa|Norway Oslo|Sweden Stockholm|Greece Athens|Cuba Havana|Austria Vienna
Poland Warsaw|Ireland Dublin|China Beijing|Russia Moscow|Chile Santiago|Belgium Brussels
Thailand Bangkok|Iraq Baghdad|Iran Tehran|Ghana Accra|Nepal Kathmandu"""

WORDS = """go we ox cat sun ice tree moon fish bird house water bread apple planet garden window
orange kitchen weather morning picture mountain elephant sandwich umbrella"""

OPENERS = """That is a great question, and I am glad you asked it.
Well, there are many ways to look at this.
Let me think about that for a moment before I reply.
First of all, thank you very much for reaching out.
As we all know, people have wondered about such things for ages.
Before I begin, some general background might be useful here.
It really depends on how you see it, but let us go on.
Many experts would have a lot to say on this topic.
Of course, I would be more than happy to help with that.
To be honest, this is something that comes up quite often.
There is a lot to unpack here, so please bear with me.
In today's world, questions like yours matter more than ever.""".splitlines()

CLOSERS = """I hope this helps, and do let me know if anything is unclear.
Please feel free to ask me for more details at any time.
Of course, others may well see it in another way.
In short, that is more or less all there is to say.
As you can see, such matters are always worth some thought.
Have a wonderful day, and thanks again for asking.
There is certainly much more that could be said about it.
With that in mind, I wish you the best of luck.
At the end of the day, only you can be the judge of that.
Again, this was a truly fascinating thing to be asked.
Needless to say, one should always check things twice.
I could go on about this for hours, but I will stop now.""".splitlines()


def _table(text: str) -> list[tuple[str, str]]:
    rows = [entry.split() for entry in text.replace("\n", "|").split("|")]
    return [(key, value) for key, value in rows]


def _lookup(
    table: list[tuple[str, str]], phrasings: tuple[str, ...], reply: str
) -> Iterator[Question]:
    """Every key in every phrasing; another key's value is the wrong answer."""
    for (key, value), phrasing in product(table, phrasings):
        wrong = tuple(reply.format(other) for _, other in table if other not in (key, value))
        yield Question(phrasing.format(key), reply.format(value), wrong)


def _addition() -> Iterator[Question]:
    phrasings = (
        "What is {} + {}?",
        "Add {} and {}.",
        "How much is {} plus {}?",
        "{} + {} = ?",
        "Give me the sum of {} and {}.",
        "What do {} and {} make together?",
    )
    for (a, b), phrasing in product(product(range(1, 10), repeat=2), phrasings):
        wrong = tuple(f"It is {a + b + d}." for d in range(-4, 5) if d and a + b + d > 0)
        yield Question(phrasing.format(a, b), f"It is {a + b}.", wrong)


def _larger() -> Iterator[Question]:
    phrasings = ("Which is larger, {} or {}?", "Which number is bigger: {} or {}?")
    for (a, b), phrasing in product(permutations(range(1, 21), 2), phrasings):
        right, wrong = f"{max(a, b)} is larger.", f"{min(a, b)} is larger."
        yield Question(phrasing.format(a, b), right, (wrong,))


def _sorting() -> Iterator[Question]:
    phrasings = ("Sort {}, {}, {}.", "Put {}, {}, {} in order, smallest first.")
    reply = "In order: {}, {}, {}."
    shuffles = (order for three in combinations(range(1, 10), 3) for order in permutations(three))
    for order, phrasing in product(shuffles, phrasings):
        right = tuple(sorted(order))
        wrong = tuple(reply.format(*other) for other in permutations(order) if other != right)
        yield Question(phrasing.format(*order), reply.format(*right), wrong)


def _opposites() -> Iterator[Question]:
    phrasings = (
        "What is the opposite of {}?",
        "Name the opposite of {}.",
        "Which word means the reverse of {}?",
        "Give me an antonym for {}.",
        "Complete the pair: {} and what?",
        "I need the word that is the contrary of {}.",
        "Not {}, but the other way round: which word is it?",
        "{} has which opposite?",
    )
    table = _table(OPPOSITES)
    return _lookup(table + [(b, a) for a, b in table], phrasings, "It is {}.")


def _plurals() -> Iterator[Question]:
    phrasings = (
        "What is the plural of {}?",
        "Give the plural form of {}.",
        "One {}, two what?",
        "How do you write more than one {}?",
        "Turn {} into a plural.",
        "I have one {} and buy another; now I have two of what?",
        "Write {} in the plural.",
        "{} is singular. What is its plural?",
    )
    return _lookup(_table(PLURALS), phrasings, "The plural is {}.")


def _capitals() -> Iterator[Question]:
    phrasings = (
        "What is the capital of {}?",
        "Name the capital city of {}.",
        "Which city is the capital of {}?",
        "{} has which capital?",
        "Tell me where the government of {} sits.",
        "I am writing about {}. What is its capital?",
        "Give me the capital of {}.",
        "On a map of {}, which city is marked as the capital?",
    )
    return _lookup(_table(CAPITALS), phrasings, "It is {}.")


def _letters() -> Iterator[Question]:
    phrasings = (
        "How many letters are in the word {}?",
        "Count the letters of {}.",
        "How long is the word {}?",
        "Tell me the number of letters in {}.",
        "The word {} has how many letters?",
        "Spell {} in your head: how many letters is that?",
        "How many letters do I need to write {}?",
        "What is the letter count of {}?",
    )
    for word, phrasing in product(WORDS.split(), phrasings):
        wrong = tuple(f"It has {n} letters." for n in range(2, 10) if n != len(word))
        yield Question(phrasing.format(word), f"It has {len(word)} letters.", wrong)


FAMILIES: dict[str, Callable[[], Iterator[Question]]] = {
    "addition": _addition,
    "larger": _larger,
    "sorting": _sorting,
    "opposites": _opposites,
    "plurals": _plurals,
    "capitals": _capitals,
    "letters": _letters,
}


def _pad(sentence: str, rng: random.Random) -> str:
    """Wrap a sentence in waffle: before, after, or both."""
    opener, closer = rng.choice(OPENERS), rng.choice(CLOSERS)
    return rng.choice(
        (f"{opener} {sentence}", f"{sentence} {closer}", f"{opener} {sentence} {closer}")
    )


def _pair(family: str, question: Question, rng: random.Random) -> Pair:
    kind: Kind = "padded" if rng.random() < PADDED_SHARE else "wrong"
    worse = _pad(question.right, rng) if kind == "padded" else rng.choice(question.wrong)
    return Pair(family, kind, question.prompt, question.right, worse)


def make_pairs(seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Training pairs and held-out pairs, each prompt once in all; the same for the same seed.

    Smaller families give what they have to training. A held-out question about a word or a country
    is asked in training too, but in other words; held-out sums, comparisons and sorts may be new.
    """
    rng = random.Random(seed)
    train: list[Pair] = []
    test: list[Pair] = []
    for family, questions in FAMILIES.items():
        pairs = [_pair(family, question, rng) for question in questions()]
        rng.shuffle(pairs)
        test += pairs[:TEST_PER_FAMILY]
        train += pairs[TEST_PER_FAMILY:][:TRAIN_PER_FAMILY]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def write_dataset(folder: Path, train: list[Pair], test: list[Pair]) -> None:
    """Write `train.jsonl` and `test.jsonl`: a row each line, columns prompt, chosen, rejected."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("train", train), ("test", test)):
        lines = [json.dumps(pair.row(), ensure_ascii=False) for pair in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
