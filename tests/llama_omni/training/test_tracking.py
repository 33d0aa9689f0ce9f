"""metrics.jsonl stays readable, and without repeats, after a kill."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llama_omni.training.tracker import Tracker

if TYPE_CHECKING:
    from pathlib import Path


def track(folder: Path, **options: Any) -> Tracker:
    options = {"is_main": True, "project": "p", "name": "n", **options}
    return Tracker("none", folder, tensorboard_dir=folder, **options)


def test_a_resumed_run_drops_torn_and_repeated_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "train/lo')
    tracker = track(tmp_path, start_step=2)
    tracker.log({"train/loss": 0.5}, step=3)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in found] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_a_new_run_keeps_what_an_earlier_one_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9}\n{"step"')
    track(tmp_path).log({"train/loss": 0.5}, step=1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [9, 1]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    track(tmp_path, is_main=False).log({"train/loss": 0.5}, step=1)
    assert not list(tmp_path.iterdir())
