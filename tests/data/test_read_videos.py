"""data/read_videos.py: right videos are right, each mistake counts where it belongs, messages."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from data.make_videos import encode_video, make_videos
from data.read_videos import CHANCE, decode_video, main, read_videos, shares

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_videos(folder, count=40, seconds=13 / 15, per_folder=25, show_progress=False)
    return folder


def test_right_videos_are_right_and_others_near_chance(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(made), str(made), "--readings", str(tmp_path / "readings.jsonl")])
    result = json.loads(capsys.readouterr().out)
    assert result["videos"] == 40
    assert result["right"] == {"color": 1.0, "direction": 1.0, "both": 1.0}
    assert result["chance"] == CHANCE == {"color": 0.125, "direction": 0.25, "both": 0.03125}
    other = result["against_another_caption"]
    assert other["color"] < 0.4
    assert other["direction"] < 0.6
    lines = [json.loads(line) for line in (tmp_path / "readings.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"{n:06d}" for n in range(40)]
    assert all(line["seen_color"] in line["caption"] for line in lines)


def test_each_mistake_counts_where_it_belongs(made: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(made.rglob("*.mp4"))[:8]):
        frames = decode_video(path)
        wrong = [frames[::-1], frames[:1].repeat(13, axis=0), frames * 0, frames][number % 4]
        encode_video(tmp_path / path.name, wrong, fps=15)
    right = shares(read_videos(tmp_path, made))
    assert right == {"color": 0.75, "direction": 0.25, "both": 0.25}


def test_messages(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, videos = tmp_path / "empty", tmp_path / "videos"
    empty.mkdir()
    videos.mkdir()
    shutil.copy(next(iter(made.rglob("000003.mp4"))), videos)

    def message(*words: Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "holds no .mp4 file" in message(empty, made)
    assert "holds no 000003.txt" in message(videos, empty)
    (videos / "000003.mp4").write_bytes(b"no video")
    assert "not a video that can be read" in message(videos, made)
