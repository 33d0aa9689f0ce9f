"""trial.py, judge.py, small_result.py: stages that go on, shares that are right, the picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.shapes import is_held_out, list_combinations, render_scene
from longcat_video_fft import judge, small_result, trial
from longcat_video_fft.config import load_config
from longcat_video_fft.data_config import load_data_config
from longcat_video_fft.trial import OutOfTimeError, Trial

FOLDER = Path(trial.__file__).parent


def make_trial(out: Path, **changes: Any) -> Trial:
    options: dict[str, Any] = {
        "out": out, "configs": FOLDER / "small", "size": "demo", "num_videos": 3,
        "num_held_out": 2, "width": 48, "height": 32, "num_frames": 5, "vae_words": (),
        "cache_processes": 1, "launcher": (),
    }  # fmt: skip
    return Trial(**(options | changes))


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return judge.held_out_prompts(40)


@pytest.fixture(scope="module")
def videos(scenes: list[Any]) -> np.ndarray:
    return np.stack([render_scene(s, width=96, height=64, num_frames=13) for s in scenes])


def test_prompts_show_combinations_that_training_never_sees(scenes: list[Any]) -> None:
    trained = set(list_combinations("train"))
    for scene in scenes:
        combination = (scene.colour, scene.shape, scene.direction)
        assert combination not in trained
        assert is_held_out(combination)  # pyright: ignore[reportArgumentType]
    assert len({(s.colour, s.shape, s.direction) for s in scenes}) > 15


def test_right_videos_are_right_and_others_near_chance(
    scenes: list[Any], videos: np.ndarray
) -> None:
    readings = judge.read_videos(scenes, videos)
    assert judge.shares(readings) == {"colour": 1.0, "direction": 1.0, "both": 1.0}
    other = judge.shares(readings, turned=1)
    assert other["colour"] < 0.4
    assert other["direction"] < 0.6
    assert other["both"] < 0.2


def test_each_mistake_counts_where_it_belongs(scenes: list[Any], videos: np.ndarray) -> None:
    backwards = judge.shares(judge.read_videos(scenes, videos[:, ::-1]))
    assert backwards == {"colour": 1.0, "direction": 0.0, "both": 0.0}
    still = judge.shares(judge.read_videos(scenes, videos[:, :1].repeat(13, axis=1)))
    assert still == {"colour": 1.0, "direction": 0.0, "both": 0.0}
    empty = judge.shares(judge.read_videos(scenes, np.zeros_like(videos)))
    assert empty == {"colour": 0.0, "direction": 0.0, "both": 0.0}


def test_the_description_tells_chance(scenes: list[Any], videos: np.ndarray) -> None:
    text = judge.describe("guidance 4", judge.read_videos(scenes, videos))
    assert "colour 100%" in text
    assert "chance 12%" in text
    assert "of 40 prompts" in text


def test_the_grid(scenes: list[Any], videos: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    judge.draw_grid(path, [s.caption for s in scenes[:3]], videos[:3])
    picture = np.asarray(Image.open(path))
    cell_width, cell_height = 5 * 98 - 2 + 8, 13 + 64 + 8  # one line of text each
    assert picture.shape == (2 * cell_height, 2 * cell_width, 3)
    # The last frame of the second prompt, right of the first's strip.
    left = cell_width + 4 * 98
    np.testing.assert_array_equal(picture[13:77, left : left + 96], videos[1, -1])
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("name", ["small", "demo"])
def test_configs_are_sound(name: str) -> None:
    config = load_config(["--config", str(FOLDER / name / "training_config.json")])
    data = load_data_config(FOLDER / name / str(config.data_backend_config))
    assert data.rule.frames[0] % 4 == 1
    assert config.transformer_init == "random"
    assert config.flow_shift < 12


def test_every_batch_of_the_small_result_is_full() -> None:
    """A rest of another size would be compiled for itself."""
    config = load_config(["--config", str(FOLDER / "small" / "training_config.json")])
    assert small_result.NUM_VIDEOS % config.train_batch_size == 0
    assert config.num_held_out_samples == 0


def test_a_stage_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    calls: list[int] = []
    this = make_trial(tmp_path)
    for _ in range(2):
        trial.run_stage(this, "data", lambda _: calls.append(1))
    assert len(calls) == 1
    assert list(json.loads((tmp_path / trial.STAGES).read_text())) == ["data"]

    def fail(_: Trial) -> None:
        raise SystemExit("failed")

    with pytest.raises(SystemExit):
        trial.run_stage(this, "vae", fail)
    assert list(trial.read_stages(tmp_path)) == ["data"]


def test_no_stage_starts_without_time(tmp_path: Path) -> None:
    late = make_trial(tmp_path, seconds=0.0)
    with pytest.raises(OutOfTimeError, match="stage vae"):
        trial.run_stage(late, "vae", lambda _: None)
    with pytest.raises(OutOfTimeError, match="training"):
        trial.train(make_trial(tmp_path, seconds=50.0, reserve=60.0))


def test_data_and_a_command_that_fails(tmp_path: Path) -> None:
    this = make_trial(tmp_path)
    trial.make_data(this)
    assert len(list((tmp_path / "train").rglob("*.mp4"))) == 3
    assert len(list((tmp_path / "held_out").rglob("*.txt"))) == 2
    assert (tmp_path / "databackend.json").is_file()
    with pytest.raises(SystemExit, match="make_model: failed with exit status 1"):
        trial.make_model(this)  # there is no VAE yet


def test_time_ends_the_training_by_a_signal(tmp_path: Path) -> None:
    """A program in the training's place notes what reached it."""
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('seen').touch(), sys.exit(0)))\n"
        "time.sleep(60)\n"
    )
    started = trial.Trial.__dataclass_fields__["started"].default_factory()  # pyright: ignore
    this = make_trial(tmp_path, launcher=("-c", program), seconds=2.0, started=started)
    trial.train(this)
    assert (tmp_path / "seen").is_file()


def test_commands_are_shown_as_typed() -> None:
    line = trial.command("longcat_video_fft.train_vae", "train", "vae", "--steps", 5)
    assert line[0] == sys.executable
    assert trial.shown(line) == "python -m longcat_video_fft.train_vae train vae --steps 5"
