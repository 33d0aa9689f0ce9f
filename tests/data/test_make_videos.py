"""data/make_videos.py: the same bytes for the same arguments, true colors, resumes, errors."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data import make_videos as make_videos_module
from data.make_videos import encode_video, main, make_videos
from data.shapes import (
    BACKGROUNDS,
    COLORS,
    Combination,
    is_held_out,
    parse_caption,
    read_video,
    render_scene,
    scene_of,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"width": 48, "height": 32, "seconds": 0.6, "show_progress": False}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_same_arguments_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    for folder, workers, seed in ((one, 1, 5), (two, 2, 5), (other, 1, 6)):
        made = make_videos(folder, count=40, seed=seed, workers=workers, per_folder=15, **SMALL)
        assert (made.folder, made.num_videos, made.num_made) == (folder, 40, 40)
    assert digests(one) == digests(two)
    assert not set(digests(one).values()) & {
        digest for name, digest in digests(other).items() if name.endswith(".mp4")
    }
    stems = [f"{index // 15:03d}/{index:06d}" for index in range(40)]
    files = {stem + suffix for stem in stems for suffix in (".mp4", ".txt")}
    assert set(digests(one)) == files | {".make_videos.json"}


@pytest.mark.parametrize(
    ("count", "width", "height", "crf"), [(200, 96, 64, 18), (100, 32, 32, 30)]
)
def test_detector_reads_all_that_is_decoded(
    tmp_path: Path, count: int, width: int, height: int, crf: int
) -> None:
    make_videos(
        tmp_path,
        count=count,
        seed=1,
        width=width,
        height=height,
        seconds=1.0,
        crf=crf,
        show_progress=False,
    )
    wrong = []
    for index in range(count):
        scene = scene_of(1, index)
        path = tmp_path / "000" / f"{index:06d}.mp4"
        frames = decode(path)
        assert frames.shape == (15, height, width, 3)
        told = parse_caption(path.with_suffix(".txt").read_text())
        assert told[:4] == (scene.color, scene.shape, scene.direction, scene.background)
        if read_video(frames) != (told.color, told.direction):
            wrong.append(path)
    assert wrong == []


def test_colors_survive_the_round_trip(tmp_path: Path) -> None:
    for name, rgb in (COLORS | BACKGROUNDS).items():
        painted = np.tile(np.array(rgb, np.uint8), (8, 32, 48, 1))
        path = tmp_path / f"{name}.mp4"
        encode_video(path, painted, fps=15)
        assert np.abs(decode(path).astype(int) - rgb).max() <= 4, name
    # A moving shape: its inside after chroma at half the size and compression, and what is around.
    for index in range(20):
        scene = scene_of(9, index)
        frames = render_scene(scene, width=96, height=64, num_frames=30)
        path = tmp_path / f"{index}.mp4"
        encode_video(path, frames, fps=15)
        decoded = decode(path).astype(int)
        for rgb, tolerance in ((COLORS[scene.color], 16), (BACKGROUNDS[scene.background], 4)):
            inside = (frames == np.array(rgb)).all(axis=-1)
            assert np.abs(np.median(decoded[inside], axis=0) - rgb).max() <= tolerance, scene


def test_a_video_is_plain_h264_that_starts_fast(tmp_path: Path) -> None:
    make_videos(tmp_path, count=1, fps=25, seconds=1.4, width=64, height=48, show_progress=False)
    path = tmp_path / "000" / "000000.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (stream.frames, stream.average_rate) == (35, 25)
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.width, context.height) == (64, 48)
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert tags == (1, 1, 1, 1)  # BT.709 three times, limited range
    content = path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_splits_share_no_combination(tmp_path: Path) -> None:
    for split in ("train", "held_out"):
        make_videos(tmp_path / split, count=12, split=split, directions=8, **SMALL)
        for path in (tmp_path / split).rglob("*.txt"):
            told = parse_caption(path.read_text())
            assert is_held_out(Combination(*told[:3])) == (split == "held_out")


def test_second_run_makes_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    command = [str(out), "--width", "32", "--height", "32", "--seconds", "0.4", "--workers", "1"]
    main([*command, "--count", "4"])
    assert capsys.readouterr().out == f"{out}: 4 videos (4 made, 0 already there)\n"
    before = digests(out)
    (out / "000" / "000002.mp4").unlink()
    (out / "000" / "000003.txt").unlink()
    kept = (out / "000" / "000003.mp4").stat().st_mtime_ns
    main([*command, "--count", "4"])
    assert capsys.readouterr().out == f"{out}: 4 videos (2 made, 2 already there)\n"
    assert digests(out) == before
    assert (out / "000" / "000003.mp4").stat().st_mtime_ns == kept
    main([*command, "--count", "6"])
    assert before.items() < digests(out).items()


def test_other_arguments_are_refused_in_the_same_folder(tmp_path: Path) -> None:
    make_videos(tmp_path, count=2, **SMALL)
    before = digests(tmp_path)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "seed=1: .* was made with seed=0; give the same value or another folder"),
        ({"crf": 30}, "crf=30: .* was made with crf=18"),
        ({"split": "train"}, "split=train: .* was made with split=all"),
    ]
    for changed, message in changes:
        with pytest.raises(ValueError, match=message):
            make_videos(tmp_path, count=3, **(SMALL | changed))
    assert digests(tmp_path) == before
    settings = tmp_path / ".make_videos.json"
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"make_videos\.json: not valid"):
        make_videos(tmp_path, count=2, **SMALL)
    settings.unlink()
    with pytest.raises(ValueError, match=r"has videos but no \.make_videos\.json"):
        make_videos(tmp_path, count=2, **SMALL)


def test_a_failed_write_leaves_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path, frames: np.ndarray, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(make_videos_module, "encode_video", stop)
        with pytest.raises(OSError, match="disk is full"):
            make_videos(tmp_path / "out", count=1, **SMALL)
    assert list((tmp_path / "out").rglob("*.mp4")) == []
    make_videos(tmp_path / "out", count=1, **SMALL)
    make_videos(tmp_path / "whole", count=1, **SMALL)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_killed_run_is_finished_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.make_videos", "--count", "80", "--workers", "2"]
    killed = tmp_path / "killed"
    pipe = killed / "000" / "000079.mp4.part"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)  # nobody reads it: the run waits there, and is not done before it is killed
    with subprocess.Popen(
        [*command, str(killed)], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            while len(list(killed.rglob("*.mp4"))) < 10:
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert len(list(killed.rglob("*.mp4"))) < 80
    pipe.unlink()
    subprocess.run([*command, str(killed)], cwd=ROOT, check=True, capture_output=True)
    make_videos(tmp_path / "whole", count=80, show_progress=False)
    assert digests(killed) == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count=0: must be 1 or more"),
        (["--count", "3", "--workers", "0"], "workers=0: must be 1 or more"),
        (["--count", "3", "--width", "95"], "width=95: must be even (yuv420p) and at least 32"),
        (["--count", "3", "--height", "30"], "height=30: must be even (yuv420p) and at least 32"),
        (["--count", "3", "--fps", "0"], "fps=0: must be 1 or more"),
        (["--count", "3", "--seconds", "0.1"], "seconds=0.1: 1.5 frames at fps=15; give 0.2 sec"),
        (["--count", "3", "--seconds", "nan"], "seconds=nan: nan frames at fps=15"),
        (["--count", "3", "--split", "test"], "split=test: choose from all, train, held_out"),
        (["--count", "3", "--directions", "5"], "directions=5: choose from 4, 8"),
        (["--count", "3", "--crf", "0"], "crf=0: must lie in 1 to 51"),
        (["--count", "3", "--per-folder", "0"], "per_folder=0: must be 1 or more"),
    ],
)
def test_bad_arguments_give_one_message_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="out is a file; give a folder"):
        make_videos(tmp_path / "out", count=1, **SMALL)
