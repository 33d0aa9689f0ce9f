"""Reads a dataset file or folder, JSON Lines or JSON, into good and bad records; opens no audio.

Place in the data flow: dataset file -> records (record_formats.py knows each format) -> samples
(data_utils.py). A bad record never stops the reading: it is returned with its line and reason.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from llama_omni.dataset.record_formats import Turn, parse_turns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

# Taken first when a folder holds several files; the last two are the official inference output.
CANONICAL_NAMES = ("data.jsonl", "train.jsonl", "instruct_en.json", "answer.jsonl", "answer.json")
STAT_THREADS, STAT_CHUNK = 32, 256


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation; `line` is the 1-based line (JSON Lines) or item number (JSON list)."""

    source: Path
    line: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Says why a record cannot be used; with `is_warning`, why it trains less well."""

    source: Path
    line: int
    reason: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {'warning: ' if self.is_warning else ''}{self.reason}"


def read_records(
    data_path: Path, *, needs_units: bool | None = False, unit_vocab_size: int = 1000
) -> tuple[list[Record], list[BadRecord]]:
    """Returns good and bad records of a .jsonl or .json file, or of a folder that holds one.

    `needs_units` (stage 2): each answer must have units below `unit_vocab_size`, or speech to
    extract them from. Units with an id beyond that are CosyVoice2 tokens (InstructS2S-200K's
    `unit`): they are dropped where the answer's speech is given, else the record is bad. Question
    files must exist, and with `needs_units` the answer files that units will be extracted from.
    Without it, units that fit are kept and nothing is asked of the others. None asks it of those
    answers alone that have units or speech (to check a dataset for both stages).
    Raises FileNotFoundError or ValueError when the dataset as a whole cannot be read.
    """
    source = find_dataset_file(data_path)
    root = source.parent.resolve()
    questions = _read_question_paths(root / "question.json")
    notes: Counter[str] = Counter()
    records: list[Record] = []
    bad: list[BadRecord] = []
    for line, item in _read_items(source):
        try:
            if isinstance(item, ValueError):
                raise item
            turns = parse_turns(item, root, questions=questions, notes=notes)
            turns = tuple(_settle_units(t, needs_units, unit_vocab_size, notes) for t in turns)
        except ValueError as error:
            bad.append(BadRecord(source, line, str(error)))
        else:
            records.append(Record(source, line, turns))
    for note, count in notes.items():
        logger.warning("%s: %d x %s", source, count, note)
    records, missing = _split_missing(records, needs_units=needs_units)
    return records, sorted(bad + missing, key=lambda record: record.line)


def find_dataset_file(data_path: Path) -> Path:
    """Returns the dataset file that `data_path` names, or the one in that folder."""
    if data_path.is_file():
        if data_path.suffix.lower() not in (".json", ".jsonl"):
            raise ValueError(f"data_path={data_path}: a dataset is a .jsonl or .json file")
        return data_path
    if not data_path.is_dir():
        raise FileNotFoundError(f"data_path={data_path}: no such file or folder")
    suffixes = (".json", ".jsonl")
    names = sorted(path.name for path in data_path.iterdir() if path.suffix.lower() in suffixes)
    if not names:
        raise FileNotFoundError(f"data_path={data_path}: the folder holds no .jsonl or .json file")
    chosen = next((name for name in CANONICAL_NAMES if name in names), None)
    if chosen is None and len(names) > 1:
        raise ValueError(
            f"data_path={data_path}: the folder holds {', '.join(names)}; name one of these files"
        )
    return data_path / (chosen or names[0])


def _read_items(source: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line or item number, decoded JSON) of each record; a line that is not JSON comes as
    the ValueError it gave. The content, not the suffix, decides whether the file is JSON Lines."""
    with source.open("rb") as file:
        lines = ((line, text) for line, text in enumerate(file, 1) if text.strip())
        head = list(islice(lines, 2))
        if not head:
            raise ValueError(f"{source}: the file is empty")
        if _is_json_lines(head, source.suffix.lower()):
            yield from _read_lines(source, chain(head, lines))
            return
    whole = _decode(source.read_bytes())
    if isinstance(whole, ValueError):
        raise ValueError(f"{source}: {whole}")
    is_turns = isinstance(whole, list) and any(isinstance(i, dict) and "from" in i for i in whole)
    if isinstance(whole, dict) or is_turns:
        whole = [whole]  # the file is one record
    if not isinstance(whole, list) or not whole:
        raise ValueError(f"{source}: holds no records; expected a list of conversations")
    yield from enumerate(whole, 1)


def _is_json_lines(head: list[tuple[int, bytes]], suffix: str) -> bool:
    text = head[0][1].strip()
    first = _decode(text)
    if isinstance(first, ValueError):  # either a bad line, or the opening of an indented file
        return suffix == ".jsonl" and text != b"{" and not text.startswith(b"[")
    return len(head) == 2 or not isinstance(first, list)


def _read_lines(source: Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, Any]]:
    first_error, has_json = None, False
    for line, text in lines:
        item = _decode(text)
        if isinstance(item, ValueError):
            first_error = first_error or f"line {line}: {item}"
        else:
            has_json = True
        yield line, item
    if not has_json:
        raise ValueError(f"{source}: no line is JSON ({first_error})")


def _decode(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")


def _settle_units(
    turn: Turn, needs_units: bool | None, unit_vocab_size: int, notes: Counter[str]
) -> Turn:
    """Drops units that are not of this vocabulary; raises when stage 2 would have no targets."""
    if turn.tgt_units is None:
        if needs_units and turn.answer_speech_path is None:
            raise ValueError(
                "no units and no answer speech to extract them from: stage 2 needs 'tgt_units' or "
                "'speech_response_path' ('speech' in the answer's turn)"
            )
        return turn
    largest = max(turn.tgt_units)
    if largest < unit_vocab_size:
        return turn
    if needs_units is not False:
        beyond = f"outside unit_vocab_size={unit_vocab_size} (CosyVoice2 tokens?)"
        if turn.answer_speech_path is None:
            raise ValueError(f"units up to {largest}, {beyond}, and no answer speech to extract")
        notes[f"units {beyond}: dropped, to be extracted from the answer's speech"] += 1
    return replace(turn, tgt_units=None)


def _split_missing(
    records: list[Record], *, needs_units: bool | None
) -> tuple[list[Record], list[BadRecord]]:
    """Takes out the records with a missing file; in threads, since network disks answer slowly."""
    paths, owners = [], []
    for index, record in enumerate(records):
        for turn in record.turns:
            paths.append(turn.speech_path)
            owners.append(index)
            needs_answer = needs_units is not False and turn.tgt_units is None
            if needs_answer and turn.answer_speech_path is not None:
                paths.append(turn.answer_speech_path)
                owners.append(index)
    chunks = [paths[start : start + STAT_CHUNK] for start in range(0, len(paths), STAT_CHUNK)]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        exist = chain.from_iterable(pool.map(lambda chunk: [*map(_is_file, chunk)], chunks))
    missing: dict[int, BadRecord] = {}
    for index, path, is_there in zip(owners, paths, exist, strict=True):
        if not is_there and index not in missing:
            record = records[index]
            missing[index] = BadRecord(record.source, record.line, f"missing audio file {path}")
    good = [record for index, record in enumerate(records) if index not in missing]
    return good, list(missing.values())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _read_question_paths(path: Path) -> dict[str, str]:
    """Returns speech paths by question id, from the question.json beside an answers file."""
    whole = _decode(path.read_bytes()) if path.is_file() else []
    items = whole if isinstance(whole, list) else []
    return {
        str(item["id"]): item["speech"]
        for item in items
        if isinstance(item, dict) and "id" in item and "speech" in item
    }
