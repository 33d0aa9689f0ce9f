"""end_to_end.py, evaluator.py, small_result.py: stages that continue, right shares, the picture."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.shapes import Combination, list_combinations, parse_caption, render_scene, scene_of
from longcat_video_fft.options.load import load_config, load_data_config
from tests.demos.longcat_video_fft import end_to_end, evaluator, small_result
from tests.demos.longcat_video_fft.end_to_end import EndToEndRun, OutOfTimeError

FOLDER = Path(end_to_end.__file__).parent


def make_run(out: Path, **changes: Any) -> EndToEndRun:
    options: dict[str, Any] = {
        "out": out, "configs": FOLDER / "small", "size": "demo", "num_videos": 3,
        "num_held_out": 2, "width": 48, "height": 32, "num_frames": 5, "vae_argv": (),
        "cache_processes": 1, "launcher": (),
    }  # fmt: skip
    return EndToEndRun(**(options | changes))


def test_prompts_are_of_combinations_that_training_never_sees(tmp_path: Path) -> None:
    this = make_run(tmp_path, num_videos=40, num_held_out=40)
    end_to_end.make_data(this)
    prompts = evaluator.read_prompts(this)
    assert list(prompts) == [f"{n:06d}" for n in range(40)]
    asked = {combination(text) for text in prompts.values()}
    trained = {combination(path.read_text()) for path in (tmp_path / "train").rglob("*.txt")}
    assert len(asked) > 10
    assert asked <= set(list_combinations("held_out"))
    assert trained <= set(list_combinations("train"))


def combination(caption: str) -> Combination:
    scene = parse_caption(caption)
    return Combination(scene.color, scene.shape, scene.direction)


def test_videos_are_evaluated_as_files(tmp_path: Path) -> None:
    this = make_run(tmp_path, width=96, height=64, num_frames=13, num_videos=1, num_held_out=6)
    end_to_end.make_data(this)
    scenes = [scene_of(0, n, split="held_out") for n in range(6)]
    videos = np.stack([render_scene(s, width=96, height=64, num_frames=13) for s in scenes])
    videos[0] = videos[0, ::-1]
    result = evaluator.evaluate(this, "generated", list(evaluator.read_prompts(this)), videos)
    assert result["right"] == {"color": 1.0, "direction": 5 / 6, "both": 5 / 6}
    text = evaluator.describe(result)
    assert text.startswith("right of 6 prompts: color 100% (another prompt's ")
    assert "chance 12.5%" in text
    assert len(list((tmp_path / "generated").glob("*.mp4"))) == 6
    assert len((tmp_path / "generated.jsonl").read_text().splitlines()) == 6
    with pytest.raises(SystemExit, match="read_videos: failed"):
        evaluator.evaluate(this, "odd", ["nobody"], videos[:1])


def test_the_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    scenes = [scene_of(0, n) for n in range(3)]
    videos = np.stack([render_scene(s, width=96, height=64, num_frames=13) for s in scenes])
    evaluator.draw_grid(path, [scene.caption for scene in scenes], videos)
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
    this = make_run(tmp_path)
    for _ in range(2):
        end_to_end.run_stage(this, "data", lambda _: calls.append(1))
    assert len(calls) == 1
    assert end_to_end.read_stages(tmp_path)["data"]["is_done"]

    def fail(_: EndToEndRun) -> None:
        raise SystemExit("failed")

    with pytest.raises(SystemExit):
        end_to_end.run_stage(this, "vae", fail)
    assert not end_to_end.read_stages(tmp_path)["vae"]["is_done"]


def test_a_stage_continues_and_its_seconds_add_up(tmp_path: Path) -> None:
    this = make_run(tmp_path)
    for _ in range(2):
        end_to_end.run_stage(this, "train", lambda _: time.sleep(0.2))
        end_to_end.reopen_stages(tmp_path, "train", "export")
    assert end_to_end.stage_seconds(tmp_path)["train"] >= 0.4


def test_no_stage_starts_without_time(tmp_path: Path) -> None:
    late = make_run(tmp_path, seconds=0.0)
    with pytest.raises(OutOfTimeError, match="stage vae"):
        end_to_end.run_stage(late, "vae", lambda _: None)
    with pytest.raises(OutOfTimeError, match="training"):
        end_to_end.train(make_run(tmp_path, seconds=50.0, reserve=60.0))


def test_data_and_a_command_that_fails(tmp_path: Path) -> None:
    this = make_run(tmp_path)
    end_to_end.make_data(this)
    assert len(list((tmp_path / "train").rglob("*.mp4"))) == 3
    assert len(list((tmp_path / "held_out").rglob("*.txt"))) == 2
    assert (tmp_path / "databackend.json").is_file()
    with pytest.raises(SystemExit, match="make_model: failed with exit status 1"):
        end_to_end.make_model(this)  # there is no VAE yet


def test_time_ends_the_training_by_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in the training's place notes what reached it."""
    program = (
        "import pathlib, signal\n"
        "if signal.sigtimedwait({signal.SIGTERM}, 300):\n"
        "    pathlib.Path('seen').touch()\n"
    )
    this = make_run(tmp_path, launcher=("-c", program))
    monkeypatch.setattr(EndToEndRun, "seconds_left", 0.1)
    # The program inherits this: the signal is kept until it asks for it, however late it starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        end_to_end.train(this)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    assert (tmp_path / "seen").is_file()


def test_commands_are_shown_as_typed() -> None:
    line = end_to_end.command(
        "tests.demos.longcat_video_fft.train_vae", "train", "vae", "--steps", 5
    )
    assert line[0] == sys.executable
    assert (
        end_to_end.shown(line)
        == "python -m tests.demos.longcat_video_fft.train_vae train vae --steps 5"
    )
