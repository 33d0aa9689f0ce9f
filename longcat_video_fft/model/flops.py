"""Model FLOPs of a sample, for the MFU in the log and the times in `plan/dry_run.py`.

A multiply-add counts 2. Training counts three forwards (forward, gradient to inputs and to
weights); recomputed activations are not counted: they are no model FLOPs. Embedders, modulation and
the final layer (under 0.1 % at the released size) are left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from longcat_video_fft.options.launch import is_installed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longcat_video_fft.options.config import TrainConfig

# Dense bf16 by the vendors' datasheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
TRAINING_PASSES = 3
# Model FLOPs utilization at 37,440 tokens by (compiled, what a checkpointed block keeps). Measured
# on one H200, cuDNN attention, 4 layers, not sharded, torch 2.11, 2026-11-21; eager with the
# attention kept is scaled from eager with nothing kept.
MEASURED_MFU = {
    (True, "none"): 0.520, (True, "selective"): 0.463, (True, "full"): 0.403,
    (False, "none"): 0.454, (False, "selective"): 0.398, (False, "full"): 0.346,
}  # fmt: skip
# What 48 blocks on two H200 keep of that, step after step at their power limit, and what two
# options gain there (13.60, 12.73 and 10.45 s a sample), 2026-11-24 and -26.
SUSTAINED, FLASH4_GAIN, FP8_GAIN = 0.93, 1.07, 1.19
HOPPER = ("H200", "H100")  # one chip with two memories
ASSUMED_MFU = {"A100": 0.50}  # of the shipped config, here and below
OTHER_MFU = 0.40


def peak_flops(device_name: str) -> float | None:
    """Returns the datasheet's peak of a device by its name; None when unknown."""
    found = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def feed_forward_width(hidden_size: int, mlp_ratio: float) -> int:
    """Computes SwiGLU's inner width: 2/3 of the asked one, rounded up to a multiple of 256."""
    return 256 * math.ceil(int(2 * int(hidden_size * mlp_ratio) / 3) / 256)


def forward_flops(
    transformer_config: Mapping[str, Any],
    *,
    frames_latent: int,
    height_latent: int,
    width_latent: int,
    text_tokens: int = 512,
    num_cond_latents: int = 0,
) -> float:
    """Computes the FLOPs of one sample's forward.

    depth x [2 S (6 D^2 + 3 D F) + 4 L D^2 + 4 S L D + 4 S^2 D] with S video tokens, L text tokens,
    width D, feed-forward width F: attention has 4 D^2 weights, the queries and the output of
    cross-attention 2 D^2, its keys and values 2 D^2. The first `num_cond_latents` frames attend to
    each other only and take no part in cross-attention.
    """
    width = transformer_config["hidden_size"]
    ffn = feed_forward_width(width, transformer_config["mlp_ratio"])
    _, rows, columns = transformer_config["patch_size"]
    frame = (height_latent // rows) * (width_latent // columns)
    tokens, clean = frames_latent * frame, num_cond_latents * frame
    noisy = tokens - clean
    linear = 2 * tokens * (4 * width**2 + 3 * width * ffn)
    linear += 2 * noisy * 2 * width**2 + 4 * text_tokens * width**2
    attention = 4 * width * (clean**2 + noisy * tokens + noisy * text_tokens)
    return float(transformer_config["depth"] * (linear + attention))


def utilization(config: TrainConfig, gpu: str, depth: int) -> float:
    """Returns the expected MFU; uncheckpointed blocks count with their own."""
    kept = "full" if config.gradient_checkpointing_mode == "full" else "selective"
    free = min(config.uncheckpointed_blocks, depth) / depth if config.gradient_checkpointing else 1
    seconds = (1 - free) / MEASURED_MFU[config.compile, kept]
    seconds += free / MEASURED_MFU[config.compile, "none"]
    if gpu not in HOPPER:
        mfu = ASSUMED_MFU.get(gpu, OTHER_MFU)
        return mfu / MEASURED_MFU[True, "selective"] / seconds
    has_flash4 = is_installed("flash-attn-4") and config.attention_mechanism == "diffusers"
    uses_flash4 = has_flash4 or config.attention_mechanism == "flash4"
    gain = (FLASH4_GAIN if uses_flash4 else 1) * (FP8_GAIN if config.fp8_linears else 1)
    return SUSTAINED * gain / seconds
