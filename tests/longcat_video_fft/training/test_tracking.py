"""metrics.jsonl stays readable, and without repeats, after a kill; TensorBoard gets it all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from longcat_video_fft.training.tracker import Tracker
from longcat_video_fft.training.video_log import log_video, make_strip

if TYPE_CHECKING:
    from pathlib import Path


def track(folder: Path, report_to: str = "none", **options: Any) -> Tracker:
    options = {"is_main": True, "project": "p", "name": "n", **options}
    return Tracker(report_to, folder / "out", tensorboard_dir=folder / "logs", **options)


def test_a_resumed_run_drops_torn_and_repeated_lines(tmp_path: Path) -> None:
    path = tmp_path / "out" / "metrics.jsonl"
    path.parent.mkdir()
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "train/lo')
    track(tmp_path, start_step=2).log({"train/loss": 0.5}, step=3)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in found] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    tracker = track(tmp_path, is_main=False, report_to="tensorboard")
    tracker.log({"train/loss": 0.5}, step=1)
    log_video(tracker, "validation/0", tmp_path, np.zeros((2, 4, 4, 3), np.uint8), step=1)
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_metrics_and_a_strip_of_the_video(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = track(tmp_path, report_to="tensorboard")
    tracker.log({"train/loss": 0.25}, step=7)
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(16, 2)
    video = frames.repeat(3, 3)
    log_video(tracker, "validation/0", tmp_path / "0.mp4", video, step=7, caption="a cat")
    tracker.close()
    read = events.EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(7, 0.25)]
    (image,) = read.Images("validation/0")
    assert (image.step, image.height, image.width) == (7, 8, 6 * 16)
    assert any("validation/0" in tag for tag in read.Tags()["tensors"])


def test_tensorboard_hides_what_a_resume_does_again(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start_step, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        tracker = track(tmp_path, report_to="tensorboard", start_step=start_step)
        for step in steps:
            tracker.log({"train/loss": float(start_step)}, step=step)
        tracker.close()
    read = events.EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 0.0), (2, 0.0), (3, 2.0)]


def test_a_strip_has_the_first_and_the_last_frame() -> None:
    frames = np.arange(93, dtype=np.uint8)[:, None, None, None].repeat(3, 3)  # (93, 1, 1, 3)
    assert make_strip(frames)[0, :, 0].tolist() == [0, 18, 37, 55, 74, 92]
    assert make_strip(frames[:2])[0, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=rf"report_to='{name}'.*not installed"):
        track(tmp_path, report_to=name)
