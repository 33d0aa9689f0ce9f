"""How long a step takes: model FLOPs of the real order of samples over a measured utilization."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from longcat_video_fft.dataset.sampler import BLOCK
from longcat_video_fft.model.flops import (
    HOPPER,
    PEAK_FLOPS,
    TRAINING_PASSES,
    forward_flops,
    utilization,
)
from longcat_video_fft.model.flow_matching import draw_num_cond_latents

if TYPE_CHECKING:
    from longcat_video_fft.options.buckets import Bucket
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.config_rules import World
    from longcat_video_fft.plan.inputs import Samples

MAX_STEPS = 2048  # of an epoch that are looked at


class StepWork(NamedTuple):
    """FLOPs of a step, with three forwards a sample."""

    total: float  # all devices, mean over steps
    critical: float  # a device, the mean of what the step waits for
    lost: float  # the share of the devices' time that goes to waiting for longer samples
    steps_seen: int


def sample_flops(
    config: TrainConfig, transformer: dict[str, Any], bucket: Bucket, num_cond: int = 0
) -> float:
    """FLOPs of the training on one sample."""
    _, frames, height, width = bucket.latent_shape
    return TRAINING_PASSES * forward_flops(
        transformer, frames_latent=frames, height_latent=height, width_latent=width,
        text_tokens=config.max_text_tokens, num_cond_latents=num_cond,
    )  # fmt: skip


def step_work(
    config: TrainConfig, transformer: dict[str, Any], samples: Samples, world: World
) -> StepWork:
    """Over an epoch's first steps, each device with the micro-batches that it will get."""
    flops = cache(lambda bucket, cond: sample_flops(config, transformer, bucket, cond))

    def micro_batch(position: int) -> float:
        bucket, number = samples.largest, config.train_batch_size
        if samples.order is not None:
            batch = samples.order.micro_batch(position)
            bucket, number = batch.bucket, len(batch.samples)
        num_cond = draw_num_cond_latents(position, bucket.latent_shape[1], config)
        return number * flops(bucket, num_cond)

    groups, per_step = world.dp_size, config.gradient_accumulation_steps * world.dp_size
    length = BLOCK if samples.order is None else samples.order.epoch_length
    steps = min(MAX_STEPS, config.max_train_steps, math.ceil(length / per_step))
    total = critical = 0.0
    for start in range(0, steps * per_step, groups):
        works = [micro_batch(position) for position in range(start, start + groups)]
        total += sum(works)
        critical += max(works)
    lost = 1 - total / (critical * groups)
    return StepWork(total / steps, critical / steps / world.context_size, lost, steps)


def step_seconds(config: TrainConfig, work: StepWork, gpu: str, depth: int) -> float:
    """Seconds of a step on that kind of GPU."""
    return work.critical / (utilization(config, gpu, depth) * PEAK_FLOPS[gpu])


def time_lines(
    config: TrainConfig, work: StepWork, samples: Samples, world: World, *,
    gpus: list[str], depth: int,
) -> list[str]:  # fmt: skip
    """Epochs, then seconds a step and hours in all for each kind of GPU."""
    steps = f"{config.max_train_steps:,} steps"
    lines = [f"{work.steps_seen} steps of the assumed shape looked at"]
    if samples.order is not None:
        number = len(samples.order.samples)
        epoch = samples.order.epoch_length * config.train_batch_size / world.global_batch
        lines = [
            f"{number:,} samples: an epoch is {epoch:,.1f} steps; {steps} are "
            f"{config.max_train_steps / epoch:.2f} epochs",
            f"{work.steps_seen} steps of the cache's real order looked at",
        ]
    if config.lr_warmup_steps >= config.max_train_steps and config.lr_scheduler != "constant":
        lines.append(
            f"note: lr_warmup_steps={config.lr_warmup_steps} does not end within max_train_steps="
            f"{config.max_train_steps}: learning_rate is never reached"
        )
    if work.lost > 0.005:
        lines.append(
            f"{work.lost:.0%} of the GPUs' time is spent waiting: micro-batches of one step differ "
            f"in shape ({BLOCK} in a row are alike, {world.dp_size} work at once)"
        )
    for gpu in gpus:
        seconds = step_seconds(config, work, gpu, depth)
        hours = seconds * config.max_train_steps / 3600
        source = "measured on one and two H200" if gpu in HOPPER else "assumed, not measured"
        lines.append(
            f"{gpu:<5} {seconds:8.1f} s a step, {world.global_batch / seconds:.3g} samples/s; "
            f"{steps}: {hours:,.0f} h ({hours / 24:.1f} days); MFU "
            f"{utilization(config, gpu, depth):.3f} ({source})"
        )
    return lines
