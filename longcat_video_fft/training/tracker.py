"""Where metrics and videos go: OUT/metrics.jsonl and the log, always; and what `report_to` names.

TensorBoard's files go to `logging_dir`.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from longcat_video_fft.options.config import TrainConfig

logger = logging.getLogger(__name__)

PROJECT = "longcat-video"
STRIP_FRAMES = 6  # of a video, side by side in one picture


def trim_metrics(path: Path, *, start_step: int) -> None:
    """Drops what a killed run left: a half-written line, and steps that a resume does again."""
    if not path.is_file():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1] == "\n"]
    if start_step:
        lines = [line for line in lines if json.loads(line)["step"] <= start_step]
    trimmed = path.with_suffix(".partial")
    trimmed.write_text("".join(lines), encoding="utf-8")
    trimmed.replace(path)


class Tracker:
    """Writes the main process's metrics; silent on the others.

    Credentials come from the trackers' own environment.

    Raises:
        ValueError: the tracker's package is not installed.
    """

    def __init__(
        self, config: TrainConfig, output_dir: Path, *, is_main: bool, start_step: int = 0
    ) -> None:
        self.is_main = is_main
        self.path = output_dir / "metrics.jsonl"
        self.writer: Any = None
        self.run: Any = None
        self.package: Any = None  # of `run`
        if not is_main:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        trim_metrics(self.path, start_step=start_step)
        try:
            if config.report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                # What a killed run wrote past the checkpoint is hidden.
                purge_step = start_step + 1 if start_step else None
                self.writer = SummaryWriter(config.logging_dir, purge_step=purge_step)
            elif config.report_to == "wandb":
                import wandb  # pyright: ignore[reportMissingImports]

                self.package = wandb
                self.run = wandb.init(project=PROJECT, name=output_dir.name, dir=str(output_dir))
            elif config.report_to == "trackio":
                import trackio  # pyright: ignore[reportMissingImports]

                self.package = trackio
                self.run = trackio.init(project=PROJECT, name=output_dir.name)
        except ImportError as error:
            raise ValueError(
                f"report_to={config.report_to!r}: the package is not installed ({error}). Install "
                f"the extra `{config.report_to}`, or set report_to to none."
            ) from error

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        """One record at a global step; keys such as train/loss."""
        if not self.is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        logger.info(
            "step %d  %s",
            step,
            "  ".join(f"{k.split('/')[-1]} {v:.4g}" for k, v in metrics.items()),
        )
        if self.writer is not None:
            for key, value in metrics.items():
                self.writer.add_scalar(key, value, step)
        if self.run is not None:
            self.run.log(metrics, step=step)

    def log_video(
        self, name: str, path: Path, frames: np.ndarray, *, step: int, caption: str = ""
    ) -> None:
        """A video that lies at `path` (mp4), as the tracker can show it.

        Args:
            name: a key such as validation/0.
            frames: (T, H, W, 3) uint8, the same video; TensorBoard gets a strip of a few.
        """
        if not self.is_main:
            return
        logger.info("step %d  %s  %s", step, name, path)
        if self.writer is not None:
            self.writer.add_image(name, make_strip(frames), step, dataformats="HWC")
            if caption:
                self.writer.add_text(name, caption, step)
        if self.run is not None:
            video = self.package.Video(str(path), caption=caption or None, format="mp4")
            self.run.log({name: video}, step=step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()


def make_strip(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) -> (H, n W, 3): the first frame, the last and some evenly between them."""
    import numpy as np

    count = min(STRIP_FRAMES, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return np.concatenate([frames[i] for i in chosen], axis=1)
