"""All settings of a run: what the source document names, as fields here and flags of train_ds.py.

    deepspeed --num_gpus=8 train_ds.py --model_name_or_path DIR --num_train_epochs 3
    deepspeed --num_gpus=8 train_ds.py --config my_run.json

`RunArguments` says what is trained and on which data, `OmniTrainingArguments` is Hugging Face's
TrainingArguments with this project's defaults. Mistakes are found before any weight is read.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from transformers import HfArgumentParser, TrainingArguments

from vss_longcat_omni.frame_sampling import SamplingRule
from vss_longcat_omni.loss import LossWeights
from vss_longcat_omni.model.lora import LORA_TARGETS, translate_targets

logger = logging.getLogger(__name__)

TUNINGS = ("lora", "full")
TRANSCRIPTS = ("file", "none")
# Options of earlier transformers, which the source document's code uses.
RENAMED = {
    "warmup_ratio": "warmup_steps (a number below 1 is the share of all steps)",
    "overwrite_output_dir": "nothing: a run goes on where its output_dir stops with "
    "--resume_from_checkpoint latest",
    "evaluation_strategy": "eval_strategy",
    "logging_dir": "the variable TENSORBOARD_LOGGING_DIR",
}


@dataclass(kw_only=True)
class RunArguments:
    """What is trained, on what.

    Attributes:
        model_name_or_path: a folder, or a hub id (1.1 TB are downloaded, once a node).
        data_dir: holds training/ (or train/) and perhaps test/.
        cache_dir: prepared frames, features and codes; made once, used by every run.
        codec: folder of a speech codec. None: the embedded one, fitted to the answers and kept in
            cache_dir/codec.
        transcripts: "file": every answer has its output.txt. "none": the text stream is all pads,
            and the model learns to speak without a text to follow.
        tuning: "lora", or "full": everything, for small models.
        train_projectors, train_audio_heads: beside the adapters; trained_modules.safetensors
            holds them.
        frame_sampling: which frames of a video are seen (frame_sampling.py).
        max_vision_tokens: of one sample, after pooling.
        max_tokens: of one micro-batch when packing.
        packing: fill micro-batches up to max_tokens; else per_device_train_batch_size samples of
            like length.
        text_loss_weight, audio_loss_weight, semantic_loss_weight: see loss.py.
        system_prompt: text of a system turn before the question; empty: none.
        prepare_only: stop when frames, features and codes are in the cache.
        force: train although the plan says that it cannot fit.
    """

    model_name_or_path: str = "meituan-longcat/LongCat-Flash-Omni"
    data_dir: str = "data"
    cache_dir: str = "cache"
    codec: str | None = None
    transcripts: str = "file"
    tuning: str = "lora"
    lora_r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    train_projectors: bool = False
    train_audio_heads: bool = False
    frame_sampling: str = "multimodal_interleaved"
    max_vision_tokens: int = 28672
    max_tokens: int = 8192
    packing: bool = True
    text_loss_weight: float = 1.5
    audio_loss_weight: float = 0.25
    semantic_loss_weight: float = 0.1
    system_prompt: str = ""
    prepare_only: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        _check_choice("tuning", self.tuning, TUNINGS)
        _check_choice("transcripts", self.transcripts, TRANSCRIPTS)
        _check_choice("frame_sampling", self.frame_sampling, get_args(SamplingRule))
        for name in ("lora_r", "lora_alpha", "max_tokens", "max_vision_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: give a share from 0 to below 1.")
        weights = (self.text_loss_weight, self.audio_loss_weight, self.semantic_loss_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"text_loss_weight, audio_loss_weight, semantic_loss_weight={weights}: give none "
                "below 0 and at least one above."
            )
        self.lora_target_modules = list(translate_targets(self.lora_target_modules))

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(self.text_loss_weight, self.audio_loss_weight, self.semantic_loss_weight)


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
    # Its own order: HfArgumentParser takes the last but one for the kind of value.
    report_to: None | str | list[str] = None  # noqa: RUF036 - None: `default_trackers`
    remove_unused_columns: bool = False  # the collator takes samples, not columns
    logging_nan_inf_filter: bool = False  # a loss that is no number stops the run

    def __post_init__(self) -> None:
        if self.report_to is None:
            self.report_to = default_trackers()
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", "tensorboard_logs")
        if os.environ.get("PUSH_TO_HUB", "").lower() in ("1", "true", "yes"):
            self.push_to_hub = True
        if self.push_to_hub and self.hub_model_id is None and os.environ.get("HF_USER"):
            self.hub_model_id = f"{os.environ['HF_USER']}/{Path(str(self.output_dir)).name}"
        with warnings.catch_warnings():  # the documented name, from the next version an older one
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")
            super().__post_init__()


def default_trackers() -> list[str]:
    """TensorBoard, and W&B where its key is set."""
    return ["tensorboard"] + ["wandb"] * bool(os.environ.get("WANDB_API_KEY"))


def parse_arguments(argv: list[str] | None = None) -> tuple[RunArguments, OmniTrainingArguments]:
    """The settings from flags, or from --config FILE with flags on top.

    Raises:
        ValueError: a value that cannot be, or a key that does not exist.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words = _expand_config(words)
    parser = HfArgumentParser((RunArguments, OmniTrainingArguments))  # pyright: ignore
    run, training, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True
    )
    for word in unknown:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--"):
            hint = RENAMED.get(name)
            raise ValueError(
                f"--{name}: no such option"
                + (f"; it became {hint}." if hint else ". `train_ds.py --help` lists all.")
            )
    if unknown:
        raise ValueError(f"{unknown[0]!r}: options begin with --.")
    if os.environ.get("HF_HUB_ENABLE_HF_TRANSFER"):
        logger.warning(
            "HF_HUB_ENABLE_HF_TRANSFER has no effect any more: set HF_XET_HIGH_PERFORMANCE=1."
        )
    return run, training


def _expand_config(words: list[str]) -> list[str]:
    """`--config FILE` replaced by the file's keys as flags, so that later flags win."""
    if "--config" not in words:
        return words
    at = words.index("--config")
    if at + 1 == len(words):
        raise ValueError("--config: needs a JSON file.")
    path = Path(words[at + 1])
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"--config {path}: no such file.") from error
    except ValueError as error:
        raise ValueError(f"--config {path}: not readable as JSON ({error}).") from error
    names = {f.name for kind in (RunArguments, OmniTrainingArguments) for f in fields(kind)}
    flags: list[str] = []
    for key, value in values.items():
        if key not in names:
            hint = RENAMED.get(key)
            raise ValueError(
                f"{path}: {key}: no such key" + (f"; it became {hint}." if hint else ".")
            )
        flags += _as_flag(key, value)
    return flags + words[:at] + words[at + 2 :]


def _as_flag(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}.")
