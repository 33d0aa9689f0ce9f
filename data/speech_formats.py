"""Spoken turns -> dataset files, in the three shapes that llama_omni reads; see data/README.md.

Last step of `data/make_speech.py`; no command of its own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FILE_NAMES = {
    "jsonl": "data.jsonl",
    "instructs2s": "instruct_en.json",
    "conversations": "conversations.json",
}
RELEASE_PREFIX = "data/multiturn_instruction/en/"  # in InstructS2S-200K; its readers strip it
PROMPT = "<speech>\nPlease directly answer the questions in the user's speech."


class Clip(NamedTuple):
    """One spoken text. `path`, relative to OUT, has a digest of all that the audio depends on."""

    text: str
    voice: str
    speed: int  # words a minute
    pitch: int  # 0 to 99
    path: str


class Turn(NamedTuple):
    """One question and its answer."""

    question: Clip
    answer: Clip


def write_file(path: Path, content: bytes) -> None:
    """Write under another name, then rename: a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def write_datasets(
    out: Path,
    conversations: list[list[Turn]],
    answer_units: Mapping[str, Sequence[int]],
    *,
    format: str,
) -> dict[str, Path]:
    """Write the dataset files; returns their paths by format."""
    files = {}
    for name, file_name in FILE_NAMES.items():
        if format not in (name, "all"):
            continue
        if name == "jsonl":
            turns = [turn for talk in conversations for turn in talk]
            content = "".join(json.dumps(_jsonl_item(turn)) + "\n" for turn in turns)
        else:
            items = _released_items if name == "instructs2s" else _inference_items
            content = json.dumps(items(conversations, answer_units), indent=2) + "\n"
        files[name] = out / file_name
        write_file(files[name], content.encode())
    return files


def _jsonl_item(turn: Turn) -> dict[str, str]:
    return {
        "speech_instruction_path": turn.question.path,
        "text_instruction": turn.question.text,
        "text_response": turn.answer.text,
        "speech_response_path": turn.answer.path,
    }


def _released_items(
    conversations: list[list[Turn]], answer_units: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    items = []
    for index, turns in enumerate(conversations):
        conversation = []
        for turn in turns:
            units = answer_units.get(turn.answer.path)
            unit_text = units and "".join(f"<{unit}>" for unit in units)
            for speaker, clip, unit in (
                ("human", turn.question, None),
                ("gpt", turn.answer, unit_text),
            ):
                speech = RELEASE_PREFIX + clip.path
                conversation.append(
                    {"from": speaker, "speech": speech, "text": clip.text, "unit": unit}
                )
        items.append({"id": f"instruct_en_{index}", "conversation": conversation})
    return items


def _inference_items(
    conversations: list[list[Turn]], answer_units: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    items = []
    for index, turns in enumerate(conversations):
        for number, turn in enumerate(turns, start=1):
            item: dict[str, Any] = {
                "id": f"instruct_en_{index}-{number}",
                "speech": turn.question.path,
                "conversations": [
                    {"from": "human", "value": PROMPT},
                    {"from": "gpt", "value": turn.answer.text},
                ],
            }
            if turn.answer.path in answer_units:
                item["tgt_units"] = " ".join(map(str, answer_units[turn.answer.path]))
            items.append(item)
    return items
