"""Reports which values of a config cannot work, and what to do instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_omni.options.config import TrainConfig

OPTIMIZER_PRECISIONS = ("fp32_master", "bf16_stochastic", "8bit")
SCHEDULES = ("cosine", "linear", "constant_with_warmup", "constant")
STRATEGIES = ("no", "steps", "epoch")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
PARALLEL = ("auto", "ddp", "fsdp2", "deepspeed")


def validate_config(config: TrainConfig) -> None:
    """Raises ValueError (field=value, what is wrong, what to do) for what cannot work."""
    for rules in (_unsupported, _choices, _ranges, _needed, _stage_rules):
        for error in rules(config):  # in order: later rules rely on the earlier ones
            raise ValueError(f"{config.source}: {error}")


def _unsupported(c: TrainConfig) -> Iterator[str]:
    """Yields the options that peers offer and that mean nothing, or harm, here."""
    rules = (
        (c.version != "v0", "version", "only v0 exists", 'leave it at "v0"'),
        (not c.is_multimodal, "is_multimodal", "there is speech in every sample", "set it to true"),
        (c.input_type != "mel", "input_type", "Whisper reads log-mel", 'set it to "mel"'),
        (
            c.speech_normalize,
            "speech_normalize",
            "it normalizes raw waveforms, and the input here is Whisper's own log-mel",
            "set it to false",
        ),
        (
            c.fp16,
            "fp16",
            "Llama-3.1 overflows to NaN in fp16 (public reproductions of this model all report it)",
            "set bf16 to true",
        ),
        (
            c.remove_unused_columns,
            "remove_unused_columns",
            "there are no columns to remove: the loader builds its own batches",
            "set it to false",
        ),
        (
            c.optimizer_precision == "bf16",
            "optimizer_precision",
            "bf16 weights keep 8 bits, so AdamW's updates at 2e-5 round away",
            f"take one of {', '.join(OPTIMIZER_PRECISIONS)}",
        ),
        (
            c.optimizer_precision != "fp32_master" and not c.bf16,
            "optimizer_precision",
            "low-precision states go with bf16 weights",
            "set bf16 to true or take fp32_master",
        ),
    )
    for is_wrong, name, reason, remedy in rules:
        if is_wrong:
            yield f"{name}={getattr(c, name)!r} is unsupported: {reason}; {remedy}."


def _choices(c: TrainConfig) -> Iterator[str]:
    choices: dict[str, tuple[Any, ...]] = {
        "stage": (1, 2),
        "speech_encoder_type": ("whisper",),
        "speech_projector_type": ("linear",),
        "speech_generator_type": ("ctc",),
        "ctc_infeasible": ("stretch", "drop"),
        "optimizer_precision": OPTIMIZER_PRECISIONS,
        "lr_scheduler_type": SCHEDULES,
        "evaluation_strategy": STRATEGIES,
        "save_strategy": STRATEGIES,
        "report_to": TRACKERS,
        "parallel": PARALLEL,
    }
    for name, known in choices.items():
        if getattr(c, name) not in known:
            yield f"{name}={getattr(c, name)!r} is not one of {', '.join(map(str, known))}."


def _ranges(c: TrainConfig) -> Iterator[str]:
    positive = (
        "speech_encoder_ds_rate",
        "speech_encoder_hidden_size",
        "ctc_upsample_factor",
        "unit_vocab_size",
        "lora_r",
        "lora_alpha",
        "mel_size",
        "model_max_length",
        "num_train_epochs",
        "global_batch_size",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "speech_projector_lr",
        "speech_encoder_lr",
        "adam_epsilon",
        "max_grad_norm",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "ctc_loss_weight",
    )
    for name in positive:
        if getattr(c, name) is not None and not getattr(c, name) > 0:
            yield f"{name}={getattr(c, name)!r} must be above 0."
    for name in ("warmup_ratio", "adam_beta1", "adam_beta2", "lora_dropout"):
        if not 0 <= getattr(c, name) < 1:
            yield f"{name}={getattr(c, name)!r} must be at least 0 and below 1."
    for name in ("weight_decay", "dataloader_num_workers"):
        if getattr(c, name) < 0:
            yield f"{name}={getattr(c, name)!r} must not be negative."
    if c.max_steps == 0 or c.max_steps < -1:
        yield f"max_steps={c.max_steps} must be above 0, or -1 for no limit."
    try:
        layers, width, heads, ffn = c.decoder_shape
        if min(layers, width, heads, ffn) < 1 or width % heads:
            raise ValueError
    except ValueError:
        yield (
            f"ctc_decoder_config={c.ctc_decoder_config!r} must be "
            '"(layers,width,heads,feed_forward)" with a width that is a multiple of heads.'
        )


def _needed(c: TrainConfig) -> Iterator[str]:
    needed = {
        1: ("data_path", "output_dir", "model_name_or_path", "speech_encoder"),
        2: ("data_path", "output_dir", "stage1_model_path", "kmeans_model_path"),
    }[c.stage]
    for name in needed:
        if not getattr(c, name):
            remedy = f"set it in the file or give --{name} VALUE."
            yield f"{name}=null: stage {c.stage} needs it; {remedy}"
    for name in ("data_path", "validation_data_path", "deepspeed"):
        value = getattr(c, name)
        if value and not Path(value).exists():
            yield f"{name}={value!r}: no such file or folder."
    if c.stage == 2 and c.stage1_model_path and _looks_local(c.stage1_model_path):
        folder = Path(c.stage1_model_path)
        if not (folder / "config.json").is_file():
            yield (
                f"stage1_model_path={str(folder)!r}: no model there. Run stage 1 first; it leaves "
                "its result in OUT/final_model."
            )


def _looks_local(spec: str) -> bool:
    """Returns whether a model is named by a path rather than a hub id such as `org/name`."""
    return Path(spec).exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1


def _stage_rules(c: TrainConfig) -> Iterator[str]:
    if c.stage == 2:
        for name in ("freeze_backbone", "tune_speech_generator_only"):
            if not getattr(c, name):
                yield (
                    f"{name}=false is unsupported in stage 2, which trains the speech generator "
                    "alone, on the states of a frozen language model; set it to true."
                )
        for name in ("pretrain_speech_projector", "speech_projector_lr", "speech_encoder_lr"):
            if getattr(c, name) is not None:
                yield (
                    f"{name}={getattr(c, name)!r} is unsupported in stage 2, where that part is "
                    "frozen; set it to null."
                )
        for name in ("tune_speech_projector", "tune_speech_encoder", "lora_enable"):
            if getattr(c, name):
                yield (
                    f"{name}=true is unsupported in stage 2, which trains the speech generator "
                    "alone; do it in stage 1."
                )
    else:
        for name in ("tune_speech_generator_only", "has_tgt_units"):
            if getattr(c, name):
                yield f"{name}=true belongs to stage 2; stage 1 uses no units."
        if c.lora_enable and c.freeze_backbone:
            yield (
                "lora_enable=true with freeze_backbone=true contradict each other: LoRA trains the "
                "backbone; set one of them to false."
            )
    if c.tune_speech_projector and (c.tune_speech_encoder or c.lora_enable):
        yield (
            "tune_speech_projector=true trains the projector alone; set it to false to train "
            "the encoder or LoRA with it."
        )
    if c.parallel == "deepspeed" and not c.deepspeed:
        yield ("parallel='deepspeed' needs --deepspeed FILE, e.g. configs/ds_zero2_config.json.")
    if c.deepspeed and c.parallel not in ("auto", "deepspeed"):
        yield f"deepspeed={c.deepspeed!r} contradicts parallel={c.parallel!r}."
    if c.deepspeed and c.optimizer_precision != "fp32_master":
        yield (
            f"optimizer_precision={c.optimizer_precision!r} is unsupported with DeepSpeed, which "
            "keeps its own fp32 master; take fp32_master, or parallel fsdp2."
        )
    accelerate_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if accelerate_fsdp and os.environ.get("FSDP_VERSION", "2") != "2":
        yield "accelerate asks for FSDP version 1; set fsdp_version: 2 in its file."
