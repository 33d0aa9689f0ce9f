"""Holds all settings of a run, which the source document names, as flags of train_ds.py.

    deepspeed --num_gpus=8 train_ds.py --model_name_or_path DIR --num_train_epochs 3
    deepspeed --num_gpus=8 train_ds.py --config my_run.json

`RunArguments` (run_arguments.py) says what is trained and on which data, `OmniTrainingArguments` is
Hugging Face's TrainingArguments with this project's defaults.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import get_token
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from vss_longcat_omni.options.run_arguments import RunArguments, expand_config

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

# Options of earlier transformers, which the source document's code uses.
RENAMED = {
    "warmup_ratio": "warmup_steps (a number below 1 is the share of all steps)",
    "overwrite_output_dir": "nothing: a run continues where its output_dir stops with "
    "--resume_from_checkpoint latest",
    "evaluation_strategy": "eval_strategy",
    "logging_dir": "the variable TENSORBOARD_LOGGING_DIR",
}


@dataclass
class OmniTrainingArguments(TrainingArguments):
    """TrainingArguments with the source document's values as defaults."""

    output_dir: str | None = "longcat-flash-omni-vss-lora"
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 32
    learning_rate: float = 1e-4
    warmup_steps: float = 0.03  # below 1: the share of all steps
    lr_scheduler_type: str = "cosine"
    gradient_checkpointing: bool = True
    bf16: bool = True
    deepspeed: dict | str | None = "ds_config.json"
    logging_steps: float = 1
    save_strategy: str = "epoch"
    save_total_limit: int | None = 3
    dataloader_num_workers: int = 2
    report_to: list[str] | None = None  # pyright: ignore - several; None: `default_trackers`
    remove_unused_columns: bool = False  # the collator takes samples, not columns
    logging_nan_inf_filter: bool = False  # a loss that is no number stops the run
    hub_strategy: str = "end"  # the adapter, once

    def __post_init__(self) -> None:
        if self.report_to is None:
            self.report_to = default_trackers()
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", "tensorboard_logs")
        if os.environ.get("PUSH_TO_HUB", "").lower() in ("1", "true", "yes"):
            self.push_to_hub = True
        if self.push_to_hub:
            if not (self.hub_token or get_token()):
                raise ValueError("PUSH_TO_HUB needs HF_TOKEN, or `hf auth login` before.")
            if self.hub_model_id is None and os.environ.get("HF_USER"):
                self.hub_model_id = f"{os.environ['HF_USER']}/{Path(str(self.output_dir)).name}"
        with warnings.catch_warnings():  # the documented name, from the next version an older one
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")
            super().__post_init__()


def default_trackers() -> list[str]:
    """Return TensorBoard, and W&B where its key is set."""
    return ["tensorboard"] + ["wandb"] * bool(os.environ.get("WANDB_API_KEY"))


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for one that does not exist or is not installed, as Trainer would only after
    the model is loaded."""
    try:
        get_reporting_integration_callbacks(list(names))
    except ValueError as error:
        raise ValueError(f"report_to: {error}") from error
    for name in {"tensorboard", "wandb", "trackio"}.intersection(names):
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"report_to: {name} is not installed. `pip install {name}`, or choose others by "
                "--report_to (tensorboard, wandb, trackio, none)."
            )


def parse_arguments(argv: list[str] | None = None) -> tuple[RunArguments, OmniTrainingArguments]:
    """Return the settings from flags, or from --config FILE with flags on top.

    Raises:
        ValueError: a value that cannot be, or a key that does not exist.
    """
    given = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser((RunArguments, OmniTrainingArguments))  # pyright: ignore
    run, training, unknown = parser.parse_args_into_dataclasses(
        expand_config(given), return_remaining_strings=True
    )
    for arg in unknown:
        name = arg.removeprefix("--").partition("=")[0]
        if arg.startswith("--"):
            hint = RENAMED.get(name)
            is_file = "--config" in given and arg not in given
            where = f"{given[given.index('--config') + 1]}: {name}" if is_file else f"--{name}"
            raise ValueError(
                f"{where}: no such option"
                + (f"; it became {hint}." if hint else ". `train_ds.py --help` lists all.")
            )
    if unknown:
        raise ValueError(f"{unknown[0]!r}: options begin with --.")
    check_trackers(training.report_to or [])
    if os.environ.get("HF_HUB_ENABLE_HF_TRANSFER"):
        logger.warning(
            "HF_HUB_ENABLE_HF_TRANSFER has no effect any more: set HF_XET_HIGH_PERFORMANCE=1."
        )
    return run, training
