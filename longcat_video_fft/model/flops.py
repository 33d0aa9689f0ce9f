"""Model FLOPs of a sample, for the MFU in the log and the times in `plan/dry_run.py`.

A multiply-add counts 2. Training counts three forwards (forward, gradient to inputs and to
weights); recomputed activations are not counted: they are no model FLOPs. Embedders, modulation and
the final layer (under 0.1 % at the released size) are left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def peak_flops(device_name: str) -> float | None:
    """The datasheet's peak of a device by its name; None when unknown."""
    found = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def feed_forward_width(hidden_size: int, mlp_ratio: float) -> int:
    """SwiGLU's inner width: 2/3 of the asked one, rounded up to a multiple of 256."""
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
    """FLOPs of one sample's forward.

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
