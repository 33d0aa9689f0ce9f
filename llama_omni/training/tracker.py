"""Where metrics go: OUT/metrics.jsonl and the log, always; and what `report_to` names."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from llama_omni.options.config import TrainConfig

logger = logging.getLogger(__name__)


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
        if not is_main:
            return
        trim_metrics(self.path, start_step=start_step)
        name = config.run_name or output_dir.name
        try:
            if config.report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(output_dir / "tensorboard"))
            elif config.report_to == "wandb":
                import wandb  # pyright: ignore[reportMissingImports]

                self.run = wandb.init(project="llama-omni", name=name, dir=str(output_dir))
            elif config.report_to == "trackio":
                import trackio  # pyright: ignore[reportMissingImports]

                self.run = trackio.init(project="llama-omni", name=name)
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

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()
