"""The tracker of a run, and how it shows the videos of a validation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from longcat_video_fft.training.distributed import is_main_process
from longcat_video_fft.training.tracker import Tracker

if TYPE_CHECKING:
    from longcat_video_fft.options.config import TrainConfig

logger = logging.getLogger(__name__)

STRIP_FRAMES = 6  # of a video, side by side in one picture


def open_tracker(config: TrainConfig, output_dir: Path, *, start_step: int = 0) -> Tracker:
    """Returns the tracker that the config names. Raises ValueError when it is not installed."""
    return Tracker(
        config.report_to,
        output_dir,
        project="longcat-video",
        name=output_dir.name,
        tensorboard_dir=Path(config.logging_dir),
        is_main=is_main_process(),
        start_step=start_step,
    )


def log_video(
    tracker: Tracker, name: str, path: Path, frames: np.ndarray, *, step: int, caption: str = ""
) -> None:
    """Shows a video that lies at `path` (mp4), as far as the tracker can.

    Args:
        name: a key such as validation/0.
        frames: (T, H, W, 3) uint8, the same video; TensorBoard gets a strip of a few.
    """
    if not tracker.is_main:
        return
    logger.info("step %d  %s  %s", step, name, path)
    if tracker.writer is not None:
        tracker.writer.add_image(name, make_strip(frames), step, dataformats="HWC")
        if caption:
            tracker.writer.add_text(name, caption, step)
    if tracker.run is not None:
        video = tracker.package.Video(str(path), caption=caption or None, format="mp4")
        tracker.run.log({name: video}, step=step)


def make_strip(frames: np.ndarray) -> np.ndarray:
    """Makes (T, H, W, 3) -> (H, n W, 3): the first frame, the last and some evenly between them."""
    count = min(STRIP_FRAMES, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return np.concatenate([frames[i] for i in chosen], axis=1)
