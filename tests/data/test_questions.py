"""data/questions.py: distinct questions, right answers, an order that the seed alone decides."""

from __future__ import annotations

from collections import Counter

from data.questions import list_categories, number_words, order_pairs, select_pairs


def test_every_question_is_asked_once_and_has_a_short_answer() -> None:
    pairs = select_pairs(seed=0)
    assert len(pairs) > 3000
    assert len({pair.question.lower() for pair in pairs}) == len(pairs)
    assert all(1 <= len(pair.answer.split()) <= 6 for pair in pairs)
    assert {pair.category for pair in pairs} == set(list_categories())


def test_arithmetic_is_right() -> None:
    value = {number_words(number): number for number in range(1000)}
    assert len(value) == 1000
    signs = {
        "plus": lambda a, b: a + b,
        "minus": lambda a, b: a - b,
        "times": lambda a, b: a * b,
        "divided by": lambda a, b: a / b,
    }
    checked: Counter[str] = Counter()
    for pair in select_pairs(seed=0, categories=["arithmetic"], phrasings=1):
        asked = pair.question.removeprefix("What is ").removesuffix("?")
        sign = next(sign for sign in signs if f" {sign} " in asked)
        a, b = (value[words] for words in asked.split(f" {sign} "))
        assert signs[sign](a, b) == value[pair.answer.removesuffix(".").lower()], pair
        checked[sign] += 1
    assert checked == {"plus": 400, "minus": 190, "times": 121, "divided by": 121}


def test_known_facts() -> None:
    answers = {pair.question: pair.answer for pair in select_pairs(seed=0)}
    assert answers["What is the capital of New Zealand?"] == "Wellington."
    assert answers["What is the opposite of small?"] == "Big."
    assert answers["What comes after December?"] == "January."
    assert answers["What comes before Monday?"] == "Sunday."
    assert answers["What number comes before one hundred?"] == "Ninety-nine."
    assert answers["Count down from five to three."] == "Five four three."
    assert answers["What does an owlet grow into?"] == "An owl."
    assert answers["Which letter comes after Y?"] == "Z."


def test_few_distinct_pairs_mix_categories_and_answers() -> None:
    pairs = select_pairs(seed=3, distinct=48, phrasings=1)
    assert pairs == select_pairs(seed=3, distinct=48, phrasings=1)
    assert pairs != select_pairs(seed=4, distinct=48, phrasings=1)
    assert len({pair.question for pair in pairs}) == 48
    assert len({pair.answer for pair in pairs}) == 48
    assert len({pair.category for pair in pairs}) == len(list_categories())
    chosen = select_pairs(seed=0, categories=["colors", "opposites"])
    assert {pair.category for pair in chosen} == {"colors", "opposites"}


def test_order_is_passes_over_all_pairs_and_a_prefix_of_a_longer_one() -> None:
    pairs = select_pairs(seed=0, distinct=10)
    order = order_pairs(pairs, 25, seed=0)
    assert order[:17] == order_pairs(pairs, 17, seed=0)
    assert set(order[:10]) == set(order[10:20]) == set(pairs)
    assert order[:10] != order[10:20]
    assert order != order_pairs(pairs, 25, seed=1)
