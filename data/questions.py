"""Distinct spoken-style questions with short answers; used by `data/make_speech.py`.

A group is a set of phrasings and the facts that fill them. The first phrasing of every group is the
plainest one. Every question has one answer, every answer has one to about six words.

    pairs = select_pairs(seed=0, distinct=48, categories=("colors", "capitals"), phrasings=1)
"""

from __future__ import annotations

import itertools
import random
import string
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from data import facts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ONES = facts.ONES.split()  # zero to nineteen
TENS = facts.TENS.split()  # twenty to ninety
DAYS = facts.DAYS.split()
MONTHS = facts.MONTHS.split()
SIZES = facts.SIZES.split(", ")  # from small to big


@dataclass(frozen=True)
class Pair:
    """One question and its one answer, as they are spoken."""

    category: str
    question: str
    answer: str


class Group(NamedTuple):
    """Phrasings with {} fields, and facts: (what fills the fields, answer)."""

    category: str
    phrasings: tuple[str, ...]
    facts: list[tuple[tuple[str, ...], str]]


def build_groups() -> list[Group]:
    """All questions, as phrasings and facts."""
    return [
        *_arithmetic(),
        *_words(),
        *_world(),
        *_living_things(),
        *_calendar(),
        *_counting(),
    ]


def list_categories() -> list[str]:
    """Names of the categories, sorted."""
    return sorted({group.category for group in build_groups()})


def select_pairs(
    *,
    seed: int,
    distinct: int | None = None,
    categories: Sequence[str] | None = None,
    phrasings: int | None = None,
) -> list[Pair]:
    """Distinct pairs in an order that mixes categories and repeats an answer as late as possible.

    distinct: keep the first so many (None: all). categories: only these (None: all). phrasings:
    use only the first so many phrasings of each question (None: all). The result is a function of
    the arguments alone. Raises ValueError for a category that does not exist, or when there are
    fewer pairs than asked for.
    """
    known = list_categories()
    unknown = sorted(set(categories or ()) - set(known))
    if unknown:
        raise ValueError(f"categories: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    if phrasings is not None and phrasings < 1:
        raise ValueError(f"phrasings={phrasings}: must be 1 or more")
    pairs = [
        pair
        for group in build_groups()
        if not categories or group.category in categories
        for pair in _fill(group, phrasings)
    ]
    if distinct is not None and not 1 <= distinct <= len(pairs):
        raise ValueError(
            f"distinct={distinct}: the chosen categories and phrasings hold {len(pairs)} distinct "
            f"pairs; give 1 to {len(pairs)}"
        )
    random.Random(f"{seed}/pairs").shuffle(pairs)
    return _spread(pairs)[:distinct]


def order_pairs(pairs: Sequence[Pair], count: int, *, seed: int) -> list[Pair]:
    """`count` pairs: pass after pass over `pairs`, each pass shuffled by (seed, pass) alone.

    So a longer list starts with the shorter one of the same pairs and seed.
    """
    ordered: list[Pair] = []
    while len(ordered) < count:
        one_pass = list(pairs)
        random.Random(f"{seed}/pass/{len(ordered) // len(pairs)}").shuffle(one_pass)
        ordered += one_pass
    return ordered[:count]


def number_words(number: int) -> str:
    """0 to 999 in words: 144 is "one hundred and forty-four"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{ONES[hundreds]} hundred" + (f" and {number_words(rest)}" if rest else "")


def _spread(pairs: list[Pair]) -> list[Pair]:
    """Sort by how often the answer came before, then deal from the categories in turn."""
    answers: Counter[str] = Counter()
    dealt: Counter[tuple[str, int]] = Counter()
    keyed = []
    for pair in pairs:
        repeat = answers[pair.answer]
        place = dealt[pair.category, repeat]
        answers[pair.answer] += 1
        dealt[pair.category, repeat] += 1
        keyed.append(((repeat, place), pair))
    return [pair for _, pair in sorted(keyed, key=lambda item: item[0])]


def _fill(group: Group, phrasings: int | None) -> Iterator[Pair]:
    for fields, answer in group.facts:
        for phrasing in group.phrasings[:phrasings]:
            question = phrasing.format(*fields)
            yield Pair(group.category, _capital(question), _capital(answer) + ".")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _rows(table: str) -> list[list[str]]:
    """ "a: b, c: d" -> [["a", "b"], ["c", "d"]]; line breaks count as spaces."""
    return [row.strip().split(": ") for row in " ".join(table.split()).split(",")]


def _facts(table: str, answer: str = "{}") -> list[tuple[tuple[str, ...], str]]:
    return [((left,), answer.format(right)) for left, right in _rows(table)]


def _swapped(table: str, answer: str = "{}") -> list[tuple[tuple[str, ...], str]]:
    return [((right,), answer.format(left)) for left, right in _rows(table)]


def _members(table: dict[str, str]) -> list[tuple[tuple[str, ...], str]]:
    return [((name,), group) for group, names in table.items() for name in names.split(", ")]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _arithmetic() -> list[Group]:
    say = number_words
    sums = [((say(a), say(b)), say(a + b)) for a in range(1, 21) for b in range(1, 21)]
    differences = [((say(a), say(b)), say(a - b)) for a in range(2, 21) for b in range(1, a)]
    products = [((say(a), say(b)), say(a * b)) for a in range(2, 13) for b in range(2, 13)]
    quotients = [((say(a * b), say(b)), say(a)) for a in range(2, 13) for b in range(2, 13)]
    return [
        Group("arithmetic", ("What is {} plus {}?", "Please add {} and {}."), sums),
        Group("arithmetic", ("What is {} minus {}?", "How much is {} take away {}?"), differences),
        Group("arithmetic", ("What is {} times {}?", "Multiply {} by {}."), products),
        Group("arithmetic", ("What is {} divided by {}?",), quotients),
    ]


def _words() -> list[Group]:
    opposites = ("What is the opposite of {}?", "Tell me the opposite of {}.")
    plurals = ("What is the plural of {}?", "One {}, two what?")
    verbs = ("What is the past tense of {}?", "Today I {}, yesterday I what?")
    degrees = [((first, second), third) for first, second, third in _rows(facts.DEGREES)]
    return [
        Group("opposites", opposites, _facts(facts.OPPOSITES) + _swapped(facts.OPPOSITES)),
        Group("plurals", plurals, _facts(facts.PLURALS)),
        Group("verbs", verbs, _facts(facts.PASTS)),
        Group("adjectives", ("{}, {}, and then?", "What follows {} and {}?"), degrees),
    ]


def _world() -> list[Group]:
    capitals = ("What is the capital of {}?", "Name the capital city of {}.")
    countries = ("Which country has the capital {}?", "{} is the capital of which country?")
    continents = ("Which continent is {} in?", "Where in the world is {}?")
    mixtures = ("What do you get if you mix {}?", "Which color do {} make?")
    colors = ("What color is {}?", "Tell me the color of {}.", "Do you know what color {} is?")
    kinds = ("What is {}?", "Can you tell me what {} is?")
    where = _members(facts.CONTINENTS)
    what = [(fields, _with_article(kind)) for fields, kind in _members(facts.KINDS)]
    return [
        Group("capitals", capitals, _facts(facts.CAPITALS)),
        Group("capitals", countries, _swapped(facts.CAPITALS)),
        Group("continents", continents, where),
        Group("colors", colors, _facts(facts.COLORS)),
        Group("colors", mixtures, _facts(facts.MIXTURES)),
        Group("kinds", kinds, what),
        Group("jobs", ("Who {}?", "What do you call someone who {}?"), _facts(facts.JOBS)),
        Group("tools", ("What do you need to {}?", "What helps to {}?"), _facts(facts.TOOLS)),
    ]


def _living_things() -> list[Group]:
    young = ("What is a young {} called?", "What is the name for a baby {}?")
    grown = ("What does {} grow into?", "What will {} become?")
    babies = [
        (fields, _with_article(noun))
        for fields, noun in _facts(facts.YOUNG + "," + facts.MORE_YOUNG)
    ]
    adults = [
        ((_with_article(child),), _with_article(parent))
        for (child,), parent in _swapped(facts.YOUNG)
        if child not in facts.MANY_PARENTS
    ]
    sounds = ("What sound does {} make?", "How does {} sound?")
    homes = ("Where does {} live?", "Where would you look for {}?")
    sizes = [
        ((SIZES[a], SIZES[b]), SIZES[max(a, b)])
        for a in range(len(SIZES))
        for b in range(len(SIZES))
        if a != b
    ]
    return [
        Group("young", young, babies),
        Group("young", grown, adults),
        Group("sounds", sounds, _facts(facts.SOUNDS)),
        Group("homes", homes, _facts(facts.HOMES, "in {}")),
        Group("body", ("What do you {} with?", "Which part of you can {}?"), _facts(facts.BODY)),
        Group("sizes", ("Which is bigger, {} or {}?",), sizes),
    ]


def _calendar() -> list[Group]:
    after = ("What comes after {}?", "If it is {} now, what comes next?")
    before = ("What comes before {}?", "If it is {} now, what was before?")
    groups = []
    for names in (DAYS, MONTHS):
        following = [((name,), names[(i + 1) % len(names)]) for i, name in enumerate(names)]
        previous = [((name,), names[i - 1]) for i, name in enumerate(names)]
        groups += [Group("calendar", after, following), Group("calendar", before, previous)]
    skipping = [((day,), DAYS[(i + 2) % 7]) for i, day in enumerate(DAYS)]
    return [*groups, Group("calendar", ("Which day is two days after {}?",), skipping)]


def _counting() -> list[Group]:
    say = number_words
    runs = [(a, a + length - 1) for length in (3, 4, 5) for a in range(1, 17)]
    up = [((say(a), say(b)), " ".join(map(say, range(a, b + 1)))) for a, b in runs]
    down = [((say(b), say(a)), " ".join(map(say, range(b, a - 1, -1)))) for a, b in runs]
    following = [((say(n),), say(n + 1)) for n in range(1, 100)]
    previous = [((say(n),), say(n - 1)) for n in range(2, 101)]
    amounts = [((what,), say(int(number))) for what, number in _rows(facts.AMOUNTS)]
    larger = [((say(a), say(b)), say(max(a, b))) for a in range(1, 21) for b in range(1, 21, 2)]
    larger = [(fields, answer) for fields, answer in larger if fields[0] != fields[1]]
    letters = [((a,), b) for a, b in itertools.pairwise(string.ascii_uppercase)]
    return [
        Group("counting", ("Count from {} to {}.", "Please count from {} up to {}."), up),
        Group("counting", ("Count down from {} to {}.",), down),
        Group("numbers", ("What number comes after {}?", "Which number follows {}?"), following),
        Group("numbers", ("What number comes before {}?",), previous),
        Group("numbers", ("Which is more, {} or {}?",), larger),
        Group("amounts", ("How many {}?", "Tell me, how many {}?"), amounts),
        Group("letters", ("Which letter comes after {}?",), letters),
    ]
