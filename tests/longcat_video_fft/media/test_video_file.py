"""mp4 out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from longcat_video_fft.media.video_file import read_frames, write_mp4

if TYPE_CHECKING:
    from pathlib import Path


def test_a_video_is_the_same_each_time(tmp_path: Path) -> None:
    t, y, x = np.meshgrid(np.arange(20), np.arange(64), np.arange(96), indexing="ij")
    frames = (np.stack([x * 3 + t * 5, y * 2, x + y + t], axis=-1) % 256).astype(np.uint8)
    files = set()
    for _ in range(20):
        write_mp4(tmp_path / "video.mp4", frames)
        files.add((tmp_path / "video.mp4").read_bytes())
    assert len(files) == 1
    read = read_frames(tmp_path / "video.mp4", (64, 96))
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 8
