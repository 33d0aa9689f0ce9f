"""demo.py: its settings fit together; the whole path, shortened."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from longcat_video_fft.media.video_file import read_frames
from longcat_video_fft.options.load import load_config, load_data_config
from tests.demos.longcat_video_fft import demo, end_to_end

if TYPE_CHECKING:
    from pathlib import Path


def test_the_settings_fit_together(tmp_path: Path) -> None:
    this = demo.demo_run(tmp_path)
    config = load_config(["--config", str(this.configs / "training_config.json")])
    data = load_data_config(this.configs / str(config.data_backend_config))
    (bucket,) = {data.rule.choose_bucket(height=this.height, width=this.width, num_available=99)}
    assert bucket is not None
    assert (bucket.num_frames, bucket.height, bucket.width) == (5, 32, 48)
    assert bucket.num_frames == this.num_frames
    assert this.num_videos % config.train_batch_size == 0
    assert config.max_train_steps // config.logging_steps >= 2 * demo.AVERAGED


def test_losses_are_read_and_drawn(tmp_path: Path) -> None:
    lines = [{"step": n, "train/loss": 1 / n} for n in range(1, 4)] + [{"step": 3, "eval/x": 1.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, losses = demo.read_losses(path)
    assert (steps, losses) == ([1, 2, 3], [1.0, 1 / 2, 1 / 3])
    demo.plot(tmp_path / "loss.png", steps, losses)
    assert np.asarray(Image.open(tmp_path / "loss.png")).std() > 1


@pytest.mark.long
def test_the_whole_path_shortened(tmp_path: Path) -> None:
    whole = demo.demo_run(tmp_path / "out")
    configs = tmp_path / "configs"
    configs.mkdir()
    for name in ("training_config.json", "databackend.json"):
        options = json.loads((whole.configs / name).read_text())
        if isinstance(options, dict):
            options |= {"max_train_steps": 6, "logging_steps": 1, "train_batch_size": 8}
        (configs / name).write_text(json.dumps(options))
    argv = ("--steps", "6", "--base-dim", "4", "--batch-size", "2", "--num-held-out", "2")
    this = dataclasses.replace(whole, configs=configs, num_videos=16, vae_argv=argv)
    this.out.mkdir()
    for name, work in this.stages().items():
        end_to_end.run_stage(this, name, work)
    summary = demo.use(this)
    assert summary["steps"] == 6
    assert list(summary["stage_seconds"]) == list(this.stages())
    assert read_frames(this.out / "generated.mp4", (32, 48)).shape == (5, 32, 48, 3)
    assert {"grid.png", "loss.png"} <= {path.name for path in this.out.iterdir()}
