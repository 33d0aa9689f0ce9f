"""Model FLOPs: the published arithmetic, and torch's own counter on the real model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longcat_video_fft.model.attention_kernels import use_backend
from longcat_video_fft.model.flops import feed_forward_width, forward_flops, peak_flops
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.buckets import Bucket

RELEASED = {"hidden_size": 4096, "depth": 48, "mlp_ratio": 4, "patch_size": [1, 2, 2]}


def flops_of(bucket: Bucket, **options: int) -> float:
    _, frames, height, width = bucket.latent_shape
    return forward_flops(
        RELEASED, frames_latent=frames, height_latent=height, width_latent=width, **options
    )


@pytest.mark.parametrize(
    ("bucket", "tokens", "forward", "training"),
    [
        (Bucket(93, 480, 832), 37_440, 1.967e15, 5.90e15),
        (Bucket(73, 480, 832), 29_640, 1.376e15, 4.13e15),
        (Bucket(89, 384, 640), 22_080, 0.894e15, 2.68e15),
    ],
    ids=str,
)
def test_the_published_numbers(
    bucket: Bucket, tokens: int, forward: float, training: float
) -> None:
    assert bucket.num_tokens == tokens
    assert flops_of(bucket) == pytest.approx(forward, rel=5e-4)
    assert 3 * flops_of(bucket) == pytest.approx(training, rel=2e-3)


def test_the_released_feed_forward_width() -> None:
    assert feed_forward_width(4096, 4) == 11008


@pytest.mark.parametrize("num_cond", [0, 1, 2])
def test_torch_counts_the_same(num_cond: int) -> None:
    """torch also counts embedders, modulation and final layer, which the formula does not: two
    depths separate the blocks from the rest."""
    frames, height, width, text = 3, 8, 12, 16
    counted, wanted, modulation = [], [], []
    for depth in (1, 3):
        config = {
            "hidden_size": 64, "num_heads": 4, "depth": depth, "mlp_ratio": 4,
            "patch_size": (1, 2, 2), "caption_channels": 32, "text_tokens_zero_pad": True,
        }  # fmt: skip
        model = LongCatVideoTransformer3DModel(**config)  # pyright: ignore
        caption = torch.randn(1, 1, text, 32)
        counter = FlopCounterMode(display=False)
        with use_backend("math"), counter, torch.no_grad():  # the one that it counts on a CPU
            model(torch.randn(1, 16, frames, height, width), torch.tensor([500.0]), caption,
                  torch.ones(1, text), num_cond)  # fmt: skip
        counted.append(counter.get_total_flops())
        wanted.append(
            forward_flops(
                config, frames_latent=frames, height_latent=height, width_latent=width,
                text_tokens=text, num_cond_latents=num_cond,
            )
        )  # fmt: skip
        modulation.append(depth * 2 * frames * 512 * 6 * 64)
    between = counted[1] - counted[0] - (modulation[1] - modulation[0])
    assert between == wanted[1] - wanted[0]


def test_peaks_by_name() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("Tesla T4") is None
