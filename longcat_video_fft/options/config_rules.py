"""Which values of training_config.json and of accelerate's launcher cannot work, and what to do.

`load.load_config` calls `validate_config` within the first second; a run knows its world size then
too and calls `check_world` and `launcher_rules.check_launcher` before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longcat_video_fft.options.buckets import MAX_FRAMES, MAX_TOKENS, TOKEN_STRIDE
from longcat_video_fft.options.launch import is_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from longcat_video_fft.options.config import TrainConfig

BLOCK_CLASS = "LongCatSingleStreamBlock"

# Keys that have one value here: (the value, why another is not supported).
ONLY: dict[str, tuple[Any, str]] = {
    "model_type": ("full", "this folder trains all weights"),
    "model_family": ("longcat_video", "it is the one model of this folder"),
    "model_flavour": ("final", "it is the one that is released"),
    "base_model_precision": (
        "bf16",
        "a quantized base cannot be trained whole; to save memory set optimizer to an 8-bit one, "
        '"adamw_8bit", and leave the base as it is',
    ),
    "fsdp_version": (
        2,
        "the sharding is torch's fully_shard, which is FSDP 2; FSDP 1 cannot keep bf16 weights "
        "with stochastic rounding nor resume on another number of GPUs",
    ),
    "fsdp_state_dict_type": (
        "SHARDED_STATE_DICT",
        "a full state dict gathers 81 to 163 GB in one process; checkpoints are sharded and resume "
        "on any number of GPUs, and the export at the end is whole anyway",
    ),
    "fsdp_auto_wrap_policy": (
        "TRANSFORMER_BASED_WRAP",
        f"each {BLOCK_CLASS} is one unit of sharding, checkpointing and compiling",
    ),
    "fsdp_cpu_ram_efficient_loading": (
        True,
        "the model is built without memory and each process reads only its own slices of the "
        "weights, on one node or many",
    ),
    "musubi_block_swap_device": ("cpu", "swapped blocks are offloaded to pinned CPU memory"),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "vae_dtype": ("bf16", "fp32"),
    "lr_scheduler": ("cosine", "linear", "constant", "constant_with_warmup"),
    "optimizer": ("adamw_bf16", "adamw", "adamw_8bit"),
    "attention_mechanism": ("diffusers", "cudnn", "flash", "flash4", "math"),
    "gradient_checkpointing_mode": ("selective", "selective_ffn", "full"),
    "transformer_init": ("pretrained", "random"),
    "timestep_sampling": ("logit_normal", "uniform"),
    "report_to": ("none", "tensorboard", "wandb", "trackio"),
}

POSITIVE = (
    "max_text_tokens", "vae_chunk_frames", "train_batch_size", "decode_workers",
    "gradient_accumulation_steps",
    "flow_shift", "logit_std", "learning_rate", "max_train_steps", "checkpointing_steps",
    "checkpoints_total_limit", "adam_epsilon", "max_grad_norm", "logging_steps",
    "fsdp_replicate_size", "context_parallel_size", "validation_num_inference_steps",
    "validation_step_interval", "num_gpus", "gpu_memory_gib",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "lr_warmup_steps", "adam_weight_decay", "uncheckpointed_blocks",
    "activation_offload_blocks",
    "dataloader_num_workers", "num_held_out_samples", "musubi_blocks_to_swap",
    "num_validation_images", "validation_guidance",
)  # fmt: skip
SHARES = (
    "caption_dropout_probability", "image_to_video_probability", "continuation_probability",
    "condition_noise_max",
)  # fmt: skip


RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (POSITIVE, lambda value: value > 0, "be above 0"),
    (NOT_NEGATIVE, lambda value: value >= 0, "not be negative"),
    (SHARES, lambda value: 0 <= value <= 1, "be from 0 to 1"),
    (("adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "be at least 0 and below 1"),
)


def validate_config(c: TrainConfig) -> None:
    """Raises ValueError (field=value, what is wrong, what to do) for what cannot work."""
    for rules in (_unsupported, _choices, _ranges, _together, _validation):
        for problem in rules(c):
            raise ValueError(f"{c.source}: {problem}")


def _unsupported(c: TrainConfig) -> list[str]:
    return [
        f"{name}={getattr(c, name)!r} is not supported: {reason}; set it to "
        + (f'"{known}".' if isinstance(known, str) else f"{str(known).lower()}.")
        for name, (known, reason) in ONLY.items()
        if getattr(c, name) != known
    ]


def _choices(c: TrainConfig) -> list[str]:
    problems = [
        f"{name}={getattr(c, name)!r} is not one of {', '.join(known)}."
        for name, known in CHOICES.items()
        if getattr(c, name) not in known
    ]
    if c.mixed_precision not in ("bf16", "no"):
        remedy = {
            "fp16": 'its range is too small for this model\'s activations; set it to "bf16"',
            "fp8": 'set it to "bf16" and fp8_linears to true',
        }.get(c.mixed_precision, 'set it to "bf16", or "no" for float32')
        problems.append(f"mixed_precision={c.mixed_precision!r} is not supported: {remedy}.")
    return problems


def _ranges(c: TrainConfig) -> list[str]:
    problems = [
        f"{name}={getattr(c, name)} must {text}."
        for names, holds, text in RANGES
        for name in names
        if getattr(c, name) is not None and not holds(getattr(c, name))
    ]
    if c.ema_decay is not None and not 0 < c.ema_decay < 1:
        problems.append(
            f"ema_decay={c.ema_decay} must be between 0 and 1 (0.9999 is usual); null keeps no "
            "average."
        )
    if c.max_text_tokens > MAX_TOKENS:
        problems.append(
            f"max_text_tokens={c.max_text_tokens} must be at most {MAX_TOKENS}: captions are "
            "encoded to so many tokens."
        )
    if c.vae_chunk_frames % 4:
        problems.append(
            f"vae_chunk_frames={c.vae_chunk_frames} must be a multiple of 4: the VAE packs 4 "
            "frames into one."
        )
    return problems


def _together(c: TrainConfig) -> list[str]:
    """Finds what is missing, then pairs of values that contradict each other."""
    problems: list[str] = []
    if not c.data_backend_config:
        problems.append("data_backend_config is needed; databackend.json is one.")
    mix = c.image_to_video_probability + c.continuation_probability
    if mix > 1:
        problems.append(
            f"image_to_video_probability={c.image_to_video_probability} and "
            f"continuation_probability={c.continuation_probability} add up to {mix:g}; the rest to "
            "1 is text-to-video, so lower one."
        )
    if c.mixed_precision == "no" and c.optimizer != "adamw":
        problems.append(
            f"mixed_precision='no' with optimizer={c.optimizer!r} contradict each other: that "
            'optimizer keeps bf16 weights; set optimizer to "adamw", or mixed_precision to "bf16".'
        )
    if c.attention_mechanism == "flash4" and not is_installed("flash-attn-4"):
        problems.append(
            "attention_mechanism='flash4' needs a package that is not installed: pip install "
            '"flash-attn-4[cu13]==4.0.0b36", or set it to "diffusers".'
        )
    if c.mixed_precision == "no" and c.fp8_linears:
        problems.append(
            "fp8_linears=true with mixed_precision='no' contradict each other; set mixed_precision "
            'to "bf16".'
        )
    if not c.gradient_checkpointing and c.uncheckpointed_blocks:
        problems.append(
            f"uncheckpointed_blocks={c.uncheckpointed_blocks} selects among checkpointed "
            "blocks, and gradient_checkpointing=false has none; set one of them back."
        )
    if c.activation_offload_blocks and not c.compile:
        problems.append(
            f"activation_offload_blocks={c.activation_offload_blocks} moves what compiled blocks "
            "keep; set compile to true, or activation_offload_blocks to 0."
        )
    if not c.fsdp_enable:
        for name, unset in {
            "musubi_blocks_to_swap": 0, "fsdp_replicate_size": 1, "context_parallel_size": 1
        }.items():  # fmt: skip
            if getattr(c, name) != unset:
                problems.append(
                    f"{name}={getattr(c, name)} needs FSDP, and fsdp_enable=false turns it off; "
                    f"set fsdp_enable to true, or {name} to {unset}."
                )
    return problems


def _validation(c: TrainConfig) -> list[str]:
    problems: list[str] = []
    length = c.validation_num_video_frames
    if length < 1 or (length - 1) % 4 or length > MAX_FRAMES:
        problems.append(
            f"validation_num_video_frames={length} is not supported: a length is 4n + 1 (the "
            f"VAE packs 4 frames into one) and at most {MAX_FRAMES}, the longest that the model "
            "was trained on."
        )
    try:
        parse_resolution(c.validation_resolution)
    except ValueError as error:
        problems.append(f"validation_resolution={c.validation_resolution!r} {error}")
    return problems


def parse_resolution(text: str) -> tuple[int, int]:
    """Parses "480x832" to (height, width), the order of the official shapes."""
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise ValueError('must be HEIGHTxWIDTH, as "480x832".') from None
    if min(height, width) < 1 or height % TOKEN_STRIDE or width % TOKEN_STRIDE:
        raise ValueError(
            f"must have sides that are multiples of {TOKEN_STRIDE} (8 of the VAE x 2 of the "
            "transformer)."
        )
    return height, width


@dataclass(frozen=True, kw_only=True)
class World:
    """A world says how the devices share the work. world_size = replicate_size x shard_size."""

    world_size: int
    replicate_size: int  # copies of the sharded model (HSDP); 1: none
    shard_size: int  # devices that hold one copy together, those of one sample among them
    context_size: int  # devices that share one sample's tokens
    dp_size: int  # samples' groups: world_size / context_size
    global_batch: int


def check_world(c: TrainConfig, world_size: int) -> World:
    """Computes how the devices share the work.

    Raises:
        ValueError: the sizes do not divide, or several devices without FSDP.
    """
    copies, context = c.fsdp_replicate_size, c.context_parallel_size
    if not c.fsdp_enable and world_size > 1:
        raise ValueError(
            f"{c.source}: fsdp_enable=false with {world_size} devices is not supported: each "
            "would hold and train a whole model of its own. Set it to true, or start one process."
        )
    for name, size in (("context_parallel_size", context), ("fsdp_replicate_size", copies)):
        if world_size % size:
            raise ValueError(
                f"{c.source}: {name}={size} does not divide the {world_size} devices; set it to "
                f"one of {', '.join(map(str, divisors(world_size)))}."
            )
    if world_size % (copies * context):
        raise ValueError(
            f"{c.source}: fsdp_replicate_size={copies} x context_parallel_size={context} = "
            f"{copies * context} does not divide the {world_size} devices: the devices of one "
            "sample belong to one copy of the model. Lower one of them."
        )
    dp_size = world_size // context
    return World(
        world_size=world_size,
        replicate_size=copies,
        shard_size=world_size // copies if c.fsdp_enable else 1,
        context_size=context,
        dp_size=dp_size,
        global_batch=c.train_batch_size * c.gradient_accumulation_steps * dp_size,
    )


def check_model(c: TrainConfig, transformer: Mapping[str, Any]) -> None:
    """Raises ValueError for what does not go with this transformer's config."""
    heads, depth = transformer["num_heads"], transformer["depth"]
    if heads % c.context_parallel_size:
        raise ValueError(
            f"{c.source}: context_parallel_size={c.context_parallel_size} does not divide the "
            f"model's {heads} heads; set it to one of {', '.join(map(str, divisors(heads)))}."
        )
    for name in ("musubi_blocks_to_swap", "uncheckpointed_blocks", "activation_offload_blocks"):
        if getattr(c, name) > depth:
            raise ValueError(
                f"{c.source}: {name}={getattr(c, name)} is more than the model's {depth} blocks."
            )


def uncheckpointed_indices(c: TrainConfig, depth: int) -> list[int]:
    """Returns the blocks that keep all their activations, spread evenly over the model."""
    return spread(c.uncheckpointed_blocks if c.gradient_checkpointing else depth, range(depth))


def offloaded_blocks(c: TrainConfig, depth: int) -> list[int]:
    """Returns the blocks whose activations are CPU-offloaded. Uncheckpointed blocks come first, for
    they free the most memory; even distances let the copies keep pace with the work."""
    uncheckpointed = uncheckpointed_indices(c, depth)
    others = [index for index in range(depth) if index not in uncheckpointed]
    chosen = spread(c.activation_offload_blocks, uncheckpointed)
    return sorted(chosen + spread(c.activation_offload_blocks - len(chosen), others))


def spread(count: int, blocks: Sequence[int]) -> list[int]:
    """Chooses `count` of the blocks, or all of them, at even distances."""
    size = len(blocks)
    count = min(count, size)
    return [b for i, b in enumerate(blocks) if (i + 1) * count // size > i * count // size]


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
