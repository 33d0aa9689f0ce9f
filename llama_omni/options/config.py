"""Defines every option of both stages, read from a JSON file or the command line, and checked.

First in the data flow. `parsing.py` reads the values, `rules.py` reports which cannot work. None of
the three imports anything heavy: a mistake in a config is reported within the first second, before
any model loads.

    python train.py configs/stage1_config.json --learning_rate 1e-5
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from llama_omni.options.parsing import check_values, parse_argv, parse_text, read_json_object


@dataclass(kw_only=True)
class TrainConfig:
    """Configures one run of one stage. Names are the source document's; README.md explains each."""

    # Which stage, what goes in, what comes out.
    stage: int = 1
    data_path: str | None = None
    validation_data_path: str | None = None
    output_dir: str | None = None
    resume_from_checkpoint: str | None = None  # "latest" or a checkpoint folder
    run_name: str | None = None
    seed: int = 42

    # Model: a Llama folder or hub id for stage 1; stage 1's final_model for stage 2.
    model_name_or_path: str | None = None
    stage1_model_path: str | None = None
    version: str = "v0"
    speech_encoder: str | None = None
    speech_encoder_type: str = "whisper"
    speech_encoder_ds_rate: int = 5
    speech_encoder_hidden_size: int = 1280
    speech_projector_type: str = "linear"
    pretrain_speech_projector: str | None = None
    speech_generator_type: str = "ctc"
    ctc_decoder_config: str = "(2,4096,32,11008)"
    ctc_upsample_factor: int = 25
    ctc_loss_weight: float = 1.0
    ctc_shift_states: bool = True  # False: the released training code's off-by-one states
    ctc_infeasible: str = "stretch"  # or "drop"
    unit_vocab_size: int = 1000
    kmeans_model_path: str | None = None
    hubert_model_path: str | None = None
    unit_cache_dir: str | None = None  # default: OUT/units

    # What is trained.
    freeze_backbone: bool = False
    tune_speech_projector: bool = False  # True: the projector alone
    tune_speech_encoder: bool = False
    tune_speech_generator_only: bool = False
    lora_enable: bool = False
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05

    # Data.
    is_multimodal: bool = True
    input_type: str = "mel"
    mel_size: int = 128
    speech_normalize: bool = False
    has_tgt_units: bool = False
    pad_audio_to_30s: bool = False
    model_max_length: int = 2048
    skip_bad_records: bool = False

    # Optimization.
    num_train_epochs: float = 3.0
    max_steps: int = -1
    global_batch_size: int | None = None
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int | None = None
    learning_rate: float = 2e-5
    speech_projector_lr: float | None = None
    speech_encoder_lr: float | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    warmup_ratio: float = 0.03
    lr_scheduler_type: str = "cosine"
    max_grad_norm: float = 1.0
    bf16: bool = True
    fp16: bool = False
    optimizer_precision: str = "fp32_master"
    gradient_checkpointing: bool = True
    parallel: str = "auto"
    deepspeed: str | None = None  # a DeepSpeed JSON file

    # Evaluation, checkpoints, logs.
    evaluation_strategy: str = "epoch"
    eval_steps: int = 500
    save_strategy: str = "epoch"
    save_steps: int = 500
    save_total_limit: int | None = 3
    logging_steps: int = 10
    report_to: str = "none"

    # Data loader.
    remove_unused_columns: bool = False
    dataloader_drop_last: bool = False
    dataloader_num_workers: int = 4
    dataloader_pin_memory: bool = True

    # Where the values came from, for messages.
    source: str = field(default="the command line", repr=False)

    @property
    def decoder_shape(self) -> tuple[int, int, int, int]:
        """Returns `ctc_decoder_config` as (layers, width, heads, feed-forward width)."""
        return parse_decoder_shape(self.ctc_decoder_config)

    @property
    def trains_backbone(self) -> bool:
        """Returns whether the language model's own weights are trained."""
        is_frozen = self.freeze_backbone or self.tune_speech_projector or self.lora_enable
        return self.stage == 1 and not is_frozen

    @property
    def optimizer(self) -> str:
        """Returns the name that `training/optimizer.py` has for `optimizer_precision`."""
        names = {"fp32_master": "adamw", "bf16_stochastic": "adamw_bf16", "8bit": "adamw_8bit"}
        return names[self.optimizer_precision]

    def grad_accum_steps(self, world_size: int) -> int:
        """Returns the micro-batches a step on each device.

        Raises:
            ValueError: `global_batch_size` is not a multiple of what the devices hold at once.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps or 1
        at_once = self.per_device_train_batch_size * world_size
        if self.global_batch_size % at_once:
            raise ValueError(
                f"{self.source}: global_batch_size={self.global_batch_size} is not a multiple of "
                f"per_device_train_batch_size={self.per_device_train_batch_size} x {world_size} "
                f"device(s). Set per_device_train_batch_size to a divisor of "
                f"{self.global_batch_size / world_size:g}."
            )
        steps = self.global_batch_size // at_once
        if self.gradient_accumulation_steps not in (None, steps):
            raise ValueError(
                f"{self.source}: gradient_accumulation_steps={self.gradient_accumulation_steps} "
                f"contradicts global_batch_size={self.global_batch_size}, which needs {steps} on "
                f"{world_size} device(s). Set one of the two to null."
            )
        return steps

    def choose_strategy(self, *, has_gpu: bool, world_size: int) -> str:
        """Returns the strategy of `parallel`: "auto" is ZeRO when a DeepSpeed file is given, FSDP2
        when accelerate asks for it or stage 1 would not fit a device whole, else DDP."""
        if self.parallel != "auto":
            return self.parallel
        if self.deepspeed:
            return "deepspeed"
        asks_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        is_big = self.stage == 1 and (has_gpu or world_size > 1)
        return "fsdp2" if asks_fsdp or is_big else "ddp"

    def batch_arithmetic(self, world_size: int) -> str:
        """Formats the batch sizes as one line for the log."""
        accum = self.grad_accum_steps(world_size)
        total = self.per_device_train_batch_size * world_size * accum
        return (
            f"global batch {total} = {self.per_device_train_batch_size} a device x {world_size} "
            f"device(s) x {accum} accumulation step(s)"
        )


TYPES = {name: hint for name, hint in get_type_hints(TrainConfig).items() if name != "source"}


def parse_decoder_shape(text: str) -> tuple[int, int, int, int]:
    """Parses a `ctc_decoder_config` to (layers, width, heads, feed-forward width)."""
    layers, width, heads, ffn = (int(number) for number in text.strip("()").split(","))
    return layers, width, heads, ffn


def load_config(argv: list[str]) -> TrainConfig:
    """Reads `[CONFIG.json] [--key value | --key=value ...]`; later values win.

    Raises:
        ValueError: unreadable file, unknown key (the nearest known one is named) or wrong type.
    """
    values: dict[str, Any] = {}
    source = "the command line"
    if argv and not argv[0].startswith("--"):
        source, argv = argv[0], argv[1:]
        if not Path(source).is_file():
            remedy = "Start from configs/stage1_config.json."
            raise ValueError(f"{source}: no such config file. {remedy}")
        values = check_values(read_json_object(Path(source)), TYPES, source)
    texts = parse_argv(argv, hint="; only the first argument may be a config file")
    for key in ("local_rank", "local-rank"):  # added by the deepspeed launcher; ranks come
        texts.pop(key, None)  # from the environment
    given = {key: parse_text(key, text, TYPES) for key, text in texts.items()}
    values.update(check_values(given, TYPES, "the command line"))
    return TrainConfig(**values, source=source)
