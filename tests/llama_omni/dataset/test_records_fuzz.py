"""Damaged records: whatever stands in a line, it is read or named as bad, and never more."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from llama_omni.dataset.check import scan_records
from llama_omni.dataset.records import read_records

VALUES: list[Any] = [
    None, True, 0, -1, 1e400, "", " ", "a.wav", "../a.wav", "/", "\0", "\ud800", "1 2",
    "<9><99999>", "<speech>", "human", "gpt", [], {}, [[]], ["a.wav"], [1, 2], {"from": "human"},
    "x" * 5000,
]  # fmt: skip


def examples() -> list[Any]:
    turns = [
        {"from": "human", "speech": "a.wav", "text": "q", "unit": None},
        {"from": "gpt", "speech": "a.wav", "text": "a", "unit": "<1><2>"},
    ]
    source = {"speech_instruction_path": "a.wav", "text_instruction": "q", "text_response": "a"}
    official = {"speech": "a.wav", "conversations": [{"from": "human", "value": "q"}, turns[1]]}
    answer = {"question_id": 1, "prediction": "a", "prediction_units": "1 2", "speech": "a.wav"}
    return [source, {**source, "tgt_units": [1, 2]}, {"conversation": turns}, turns * 2, official,
            answer]  # fmt: skip


def damage(item: Any, rng: random.Random) -> Any:
    """`item` with one thing somewhere in it changed, renamed, removed or doubled."""
    if not isinstance(item, (dict, list)) or not item or rng.random() < 0.1:
        return rng.choice(VALUES)
    key = rng.choice(list(item)) if isinstance(item, dict) else rng.randrange(len(item))
    changed = item.copy()
    kind = rng.randrange(5)
    if kind == 0:
        changed.pop(key)
    elif kind == 1 and isinstance(changed, dict):
        changed[f"{key}s"] = changed.pop(key)
    elif kind == 2 and isinstance(changed, list):
        changed.append(changed[key])
    else:
        changed[key] = damage(item[key], rng)
    return changed


def check_damaged(folder: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    soundfile.write(folder / "a.wav", torch.zeros(800).numpy(), 16000)
    lines = [json.dumps(examples()[0]).encode()]
    while len(lines) < count:
        line = json.dumps(damage(damage(rng.choice(examples()), rng), rng)).encode()
        if rng.random() < 0.1:
            position = rng.randrange(len(line))
            line = line[:position] + bytes([rng.randrange(256)]) + line[position + 1 :]
        if line.strip() and b"\n" not in line:
            lines.append(line)
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    for needs_units in (False, True, None):
        records, bad = read_records(folder / "data.jsonl", needs_units=needs_units)
        found = sorted([record.line for record in records] + [b.line for b in bad])
        assert found == list(range(1, count + 1))
        assert all(b.reason and str(b) for b in bad)
        for turn in (turn for record in records for turn in record.turns):
            assert turn.answer.strip()
            assert turn.speech_path.is_file()
            assert turn.tgt_units is None or all(0 <= unit < 1000 for unit in turn.tgt_units)
            assert not needs_units or turn.tgt_units or turn.answer_speech_path
        found = [b.line for b in scan_records(records, show_progress=False)]
        assert set(found) <= {record.line for record in records}


def test_damaged_records(tmp_path: Path) -> None:
    check_damaged(tmp_path, 2000, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_damaged_records(tmp_path: Path, seed: int) -> None:
    check_damaged(tmp_path, 20_000, seed)
