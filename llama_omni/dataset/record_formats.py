"""Turns one decoded JSON record of any known format into `Turn`s (records.py reads the files).

Formats, recognized by looking at the record:

    {"speech_instruction_path", "text_instruction", "text_response", "speech_response_path"}
    {"conversation": [{"from", "speech", "text", "unit"}, ...]}       InstructS2S-200K, 1..n turns
    [{"from", "speech", "text", "unit"}, ...]                         the same, bare
    {"speech", "conversations": [{"from", "value"}, ...]}             official inference json
    {"question_id" or "speech", "prediction", "prediction_units"}     answers beside a question.json

Target units are optional in all: `tgt_units`, `unit` or `prediction_units`, as "849 761",
"<849><761>" or a list. Everything wrong with a record is a ValueError that says what.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence
    from pathlib import Path

# The one instruction of the official prompt (ictnlp/LLaMA-Omni, its released inference data).
INSTRUCTION = "Please directly answer the questions in the user's speech."
RELEASE_PREFIX = "data/multiturn_instruction/en/"  # InstructS2S-200K paths start with it
SOURCE_KEYS = (
    "speech_instruction_path",
    "text_instruction",
    "text_response",
    "speech_response_path",
)
UNIT_KEYS = ("tgt_units", "unit", "prediction_units")
KNOWN_KEYS = (*SOURCE_KEYS, "conversation", "conversations", "prediction", "speech", *UNIT_KEYS)
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
# One shared int object an id: 200,000 answers of 550 units then take 0.9 GB instead of 4 GB.
UNIT_IDS = {str(unit): unit for unit in range(8192)}


@dataclass(frozen=True, slots=True)
class Turn:
    """A spoken question and its answer; `question` is its transcript, "" where none is given."""

    speech_path: Path
    question: str
    answer: str
    answer_speech_path: Path | None
    tgt_units: tuple[int, ...] | None


def parse_turns(
    item: Any, root: Path, *, questions: dict[str, str], notes: Counter[str]
) -> tuple[Turn, ...]:
    """Returns the turns of one record. Relative paths are joined to `root`.

    `questions` gives the speech path by question id for answer records, `notes` counts what is
    worth reporting about the file as a whole. Raises ValueError with the reason.
    """
    if isinstance(item, list):
        return _parse_conversation(item, {}, root, notes)
    if not isinstance(item, dict):
        raise ValueError(f"expected an object or a list of turns, got {type(item).__name__}")
    for key in ("conversation", "conversations"):
        if key in item:
            return _parse_conversation(item[key], item, root, notes)
    if "prediction" in item:
        speech = item.get("speech") or questions.get(str(item.get("question_id")))
        if speech is None:
            raise ValueError("no 'speech', and no question.json here with this 'question_id'")
        path = _path({"speech": speech}, "speech", root)
        return (Turn(path, "", _text(item, "prediction"), None, _units(item)),)
    if not any(key in item for key in SOURCE_KEYS):
        raise ValueError(_unknown_format(item))
    return (
        Turn(
            _path(item, "speech_instruction_path", root),
            _text(item, "text_instruction"),
            _text(item, "text_response"),
            _optional_path(item, "speech_response_path", root),
            _units(item),
        ),
    )


def parse_units(units: str | Sequence[int]) -> list[int]:
    """Returns the unit ids of "849 761", "<849><761>" or [849, 761]; ValueError on others."""
    if not isinstance(units, str):
        if not isinstance(units, (list, tuple)):
            raise ValueError(f"units are a text or a list of numbers, not {type(units).__name__}")
        units = " ".join(map(str, units))
    numbers = units.replace("<", " ").replace(">", " ").split()
    try:
        return [UNIT_IDS[number] for number in numbers]
    except KeyError:
        for number in numbers:
            if not (number.isascii() and number.isdigit() and len(number) < 10):
                raise ValueError(f"unit {number[:20]!r} is not a number from 0 up") from None
        return [int(number) for number in numbers]


def _parse_conversation(
    turns: Any, item: dict[str, Any], root: Path, notes: Counter[str]
) -> tuple[Turn, ...]:
    """Parses turns that alternate human, gpt; `item` is what the official json gives beside."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("a conversation is a list of turns, and not an empty one")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is not an object")
        if ROLES.get(str(turn.get("from"))) != ("human", "gpt")[(number - 1) % 2]:
            raise ValueError(
                f"turn {number} is from {turn.get('from')!r}: turns must alternate "
                "'human' and 'gpt', the first one 'human'"
            )
    if len(turns) % 2:
        raise ValueError(f"{len(turns)} turns: the last question has no answer")
    if len(turns) > 2 and any(item.get(key) for key in ("speech", *UNIT_KEYS)):
        raise ValueError("several questions: give 'speech' and units in each turn, not beside them")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return tuple(_parse_pair(human, gpt, item, root, notes) for human, gpt in pairs)


def _parse_pair(
    human: dict[str, Any], gpt: dict[str, Any], item: dict[str, Any], root: Path, notes: Counter
) -> Turn:
    answer_path = _optional_path(gpt, "speech", root)
    return Turn(
        _path(item if item.get("speech") else human, "speech", root),
        _question_text(human, notes),
        _text(gpt, "text" if "text" in gpt else "value"),
        answer_path or _optional_path(item, "speech_response_path", root),
        _units(gpt) or _units(item),
    )


def _question_text(turn: dict[str, Any], notes: Counter[str]) -> str:
    """Returns the transcript; what follows a `<speech>` mark is an instruction instead."""
    text = _text(turn, "text" if "text" in turn else "value")
    if "<speech>" not in text:
        return text
    if text.replace("<speech>", "").strip() not in ("", INSTRUCTION):
        notes["an instruction of its own after <speech>; the official one is used instead"] += 1
    return ""


def _units(item: dict[str, Any]) -> tuple[int, ...] | None:
    for key in UNIT_KEYS:
        if item.get(key):
            return tuple(parse_units(item[key])) or None
    return None


def _path(item: dict[str, Any], key: str, root: Path) -> Path:
    return root / _text(item, key).removeprefix(RELEASE_PREFIX)


def _optional_path(item: dict[str, Any], key: str, root: Path) -> Path | None:
    return _path(item, key, root) if item.get(key) else None


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if value is None:
        raise ValueError(_missing_key(item, key))
    if not isinstance(value, str):
        raise ValueError(f"'{key}' must be a text, got {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"'{key}' holds half of a surrogate pair, which is not a character")
    value = value.strip()
    if not value:
        raise ValueError(f"'{key}' is empty")
    return value


def _missing_key(item: dict[str, Any], key: str) -> str:
    others = [name for name in item if name not in (*KNOWN_KEYS, "from", "text", "value")]
    nearest = difflib.get_close_matches(key, others, 1)
    return f"no '{key}'" + (f": is '{nearest[0]}' meant?" if nearest else f" in {_names(item)}")


def _unknown_format(item: dict[str, Any]) -> str:
    pairs = [(name, difflib.get_close_matches(name, KNOWN_KEYS, 1)) for name in item]
    hints = [f"is '{name}' meant to be '{known[0]}'?" for name, known in pairs if known]
    return (
        "no known format (needs 'speech_instruction_path', 'conversation' or 'conversations'): "
        f"{' '.join(hints) or f'found {_names(item)}'}"
    )


def _names(item: dict[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in list(item)[:8]) or "an empty object"
