"""Where metrics go: OUT/metrics.jsonl and the log, always; and what `report_to` names."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


def trim_metrics(path: Path, *, start_step: int) -> None:
    """Drop what a killed run left: a half-written line, and steps that a resume does again."""
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

    Args:
        report_to: tensorboard, wandb, trackio or none.
        output_dir: gets metrics.jsonl.
        project, name: of the run, for W&B and trackio.
        tensorboard_dir: gets TensorBoard's files.
        start_step: the global step that a resume begins at; later records are dropped.

    Raises:
        ValueError: the tracker's package is not installed.
    """

    def __init__(
        self,
        report_to: str,
        output_dir: Path,
        *,
        project: str,
        name: str,
        tensorboard_dir: Path,
        is_main: bool,
        start_step: int = 0,
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
            if report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                # What a killed run wrote past the checkpoint is hidden.
                purge_step = start_step + 1 if start_step else None
                self.writer = SummaryWriter(str(tensorboard_dir), purge_step=purge_step)
            elif report_to == "wandb":
                import wandb  # pyright: ignore[reportMissingImports]

                self.package = wandb
                self.run = wandb.init(project=project, name=name, dir=str(output_dir))
            elif report_to == "trackio":
                import trackio  # pyright: ignore[reportMissingImports]

                self.package = trackio
                self.run = trackio.init(project=project, name=name)
        except ImportError as error:
            raise ValueError(
                f"report_to={report_to!r}: the package is not installed ({error}). Install the "
                f"extra `{report_to}`, or set report_to to none."
            ) from error

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        """Write one record at a global step; its keys are such as train/loss."""
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
