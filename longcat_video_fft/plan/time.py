"""How long a step takes: model FLOPs of the real order of samples over a measured utilisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from longcat_video_fft.dataset.sampler import BLOCK
from longcat_video_fft.model.flops import PEAK_FLOPS, TRAINING_PASSES, forward_flops
from longcat_video_fft.model.flow_matching import draw_num_cond_latents
from longcat_video_fft.options.launch import is_installed

if TYPE_CHECKING:
    from longcat_video_fft.options.buckets import Bucket
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.config_rules import World
    from longcat_video_fft.plan.inputs import Samples

# Model FLOPs utilisation at 37,440 tokens by (compiled, what a checkpointed block keeps). Measured
# on one H200, cuDNN attention, 4 layers, not sharded, torch 2.11, 2026-11-21; eager with the
# attention kept is scaled from eager with nothing kept.
MEASURED_MFU = {
    (True, "none"): 0.520, (True, "selective"): 0.463, (True, "full"): 0.403,
    (False, "none"): 0.454, (False, "selective"): 0.398, (False, "full"): 0.346,
}  # fmt: skip
# What 48 blocks on two H200 keep of that, step after step at their power limit, and what two
# options gain there (13.60, 12.73 and 10.45 s a sample), 2026-11-24 and -26.
SUSTAINED, FLASH4_GAIN, FP8_GAIN = 0.93, 1.07, 1.19
MEASURED_ON = ("H200", "H100")  # one chip with two memories
ASSUMED_MFU = {"A100": 0.50}
OTHER_MFU = 0.40
MAX_STEPS = 2048  # of an epoch that are looked at

# The source document's claims for 8 A100.
CLAIMED_SECONDS = (15, 20)
CLAIMED_HOURS_10K = 40


@dataclass(frozen=True)
class StepWork:
    """FLOPs of a step, with three forwards a sample."""

    total: float  # all devices, mean over steps
    critical: float  # a device, the mean of what the step waits for
    lost: float  # the share of the devices' time that goes to waiting for longer samples
    steps_seen: int
    is_real: bool


def sample_flops(
    config: TrainConfig, transformer: dict[str, Any], bucket: Bucket, num_cond: int = 0
) -> float:
    """Of the training on one sample."""
    _, frames, height, width = bucket.latent_shape
    return TRAINING_PASSES * forward_flops(
        transformer,
        frames_latent=frames,
        height_latent=height,
        width_latent=width,
        text_tokens=config.max_text_tokens,
        num_cond_latents=num_cond,
    )


def step_work(
    config: TrainConfig, transformer: dict[str, Any], samples: Samples, world: World
) -> StepWork:
    """Over an epoch's first steps, each device with the micro-batches that it will get."""
    accumulation, groups = config.gradient_accumulation_steps, world.dp_size
    flops = cache(lambda bucket, cond: sample_flops(config, transformer, bucket, cond))

    def micro_batch(position: int) -> float:
        if samples.order is None:
            bucket, number = samples.largest, config.train_batch_size
        else:
            batch = samples.order.micro_batch(position)
            bucket, number = batch.bucket, len(batch.samples)
        cond = draw_num_cond_latents(position, bucket.latent_shape[1], config)
        return number * flops(bucket, cond)

    per_step = accumulation * groups
    length = BLOCK if samples.order is None else samples.order.epoch_length
    steps = min(MAX_STEPS, config.max_train_steps, math.ceil(length / per_step))
    total = critical = 0.0
    for start in range(0, steps * per_step, groups):
        works = [micro_batch(position) for position in range(start, start + groups)]
        total += sum(works)
        critical += max(works)
    return StepWork(
        total=total / steps,
        critical=critical / steps / world.context_size,
        steps_seen=steps,
        is_real=samples.order is not None,
        lost=1 - total / (critical * groups),
    )


def utilisation(config: TrainConfig, gpu: str, depth: int) -> tuple[float, str]:
    """(MFU, where it is from). Blocks without checkpoint count by their own."""
    if gpu in ASSUMED_MFU:
        return ASSUMED_MFU[gpu], "assumed, not measured"
    if gpu not in MEASURED_ON:
        return OTHER_MFU, "assumed, not measured"
    kept = "full" if config.gradient_checkpointing_mode == "full" else "selective"
    free = min(config.uncheckpointed_blocks, depth) / depth if config.gradient_checkpointing else 1
    seconds = (1 - free) / MEASURED_MFU[config.compile, kept]
    seconds += free / MEASURED_MFU[config.compile, "none"]
    mfu = SUSTAINED / seconds
    has_flash4 = is_installed("flash-attn-4") and config.attention_mechanism == "diffusers"
    if config.attention_mechanism == "flash4" or has_flash4:
        mfu *= FLASH4_GAIN
    if config.fp8_linears:
        mfu *= FP8_GAIN
    return mfu, "from runs on one and two H200, 37,440 tokens, 2026-11-21 to 26"


def time_lines(
    config: TrainConfig, work: StepWork, world: World, *, gpus: list[str], depth: int
) -> list[str]:
    """Seconds a step and hours in all, for each kind of GPU."""
    lines = [
        f"  a step: {work.total / 1e15:.3g} PF in all, {work.critical / 1e15:.3g} PF a GPU on the "
        f"longest way ({work.steps_seen} steps of the "
        + ("cache's real order looked at)" if work.is_real else "assumed shape)")
    ]
    if work.lost > 0.005:
        lines.append(
            f"  {work.lost:.0%} of the GPUs' time is spent waiting: micro-batches of one step "
            f"differ in shape ({BLOCK} in a row are alike, {world.dp_size} work at once)"
        )
    for gpu in gpus:
        mfu, source = utilisation(config, gpu, depth)
        seconds = work.critical / (mfu * PEAK_FLOPS[gpu])
        hours = seconds * config.max_train_steps / 3600
        lines.append(
            f"  {gpu:<5} {seconds:8.1f} s a step, {world.global_batch / seconds:.3g} samples/s; "
            f"{config.max_train_steps:,} steps: {hours:,.0f} h ({hours / 24:.1f} days); MFU "
            f"{mfu:.3f} ({source})"
        )
    return lines


def claim_lines(work: StepWork, world: World) -> list[str]:
    """The source document's speed for 8 A100, held against this config's work."""
    peak = PEAK_FLOPS["A100"]
    first, last = (work.critical / seconds / 1e12 for seconds in reversed(CLAIMED_SECONDS))
    by_hours = work.critical / (CLAIMED_HOURS_10K * 3600 / 10_000) / 1e12
    lines = [
        f"  The source document expects {CLAIMED_SECONDS[0]} to {CLAIMED_SECONDS[1]} s a step on 8 "
        f"A100, and 10,000 steps in {CLAIMED_HOURS_10K} h. This plan's {work.critical / 1e15:.3g} "
        f"PF a step and GPU ({world.dp_size} at once) would need {first:,.0f} to {last:,.0f} "
        f"TFLOP/s, and {by_hours:,.0f} for the hours;",
    ]
    if first * 1e12 > peak:
        lines.append(
            f"  an A100's peak is {peak / 1e12:.0f}: that cannot be. At the peak itself a step "
            f"takes {work.critical / peak:.0f} s; see above for what to expect."
        )
    else:
        lines.append(
            f"  an A100's peak is {peak / 1e12:.0f}, and {ASSUMED_MFU['A100']:.0%} of it is good."
        )
    return lines
