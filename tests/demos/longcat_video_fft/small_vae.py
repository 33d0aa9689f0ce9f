"""A Wan VAE to be trained: built from nothing, run with gradients, written.

B batch, T frames, H x W pixels; t, h, w of latents.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from longcat_video_fft.options.buckets import LATENT_CHANNELS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FIRST_LOG_VAR = -6.0


def build_vae(base_dim: int, num_res_blocks: int) -> Any:
    """Builds Wan's VAE with random weights; latents are not normalized yet."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import (
        AutoencoderKLWan,
        WanAttentionBlock,
        WanResidualBlock,
    )
    from torch import nn

    residual_ends: list[Any] = []
    vae: Any = AutoencoderKLWan(
        base_dim=base_dim,
        num_res_blocks=num_res_blocks,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)  # pyright: ignore
        elif isinstance(module, WanResidualBlock):
            residual_ends.append(module.conv2)
        elif isinstance(module, WanAttentionBlock):
            residual_ends.append(module.proj)
    for conv in residual_ends:  # blocks begin as identities: what comes in gets through
        nn.init.zeros_(conv.weight)
    # Noise of size 1 would drown the first latents, and the decoder learn to do without.
    nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:].detach(), FIRST_LOG_VAR)
    return vae


def load_vae(folder: Path) -> Any:
    """Loads the VAE in float32, to be trained on."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    vae: Any = AutoencoderKLWan.from_pretrained(folder, local_files_only=True)
    return vae.train()


def encode(vae: Any, video: Tensor) -> Tensor:
    """Encodes (B, 3, T, H, W) -> mean and log variance (B, 32, t, h, w), with gradients.

    Two pieces, the first frame and the rest, do what `AutoencoderKLWan._encode` does with more.
    """
    import torch

    states: list[Any] = [None] * vae._cached_conv_counts["encoder"]
    pieces = [video[:, :, :1], video[:, :, 1:]]
    out = [vae.encoder(p, feat_cache=states, feat_idx=[0]) for p in pieces if p.shape[2]]
    return vae.quant_conv(torch.cat(out, dim=2))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decodes (B, 16, t, h, w) -> (B, 3, T, H, W), not clamped, in two pieces as `encode`."""
    import torch

    states: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    x = vae.post_quant_conv(latents)
    out = [vae.decoder(x[:, :, :1], feat_cache=states, feat_idx=[0], first_chunk=True)]
    if x.shape[2] > 1:
        out.append(vae.decoder(x[:, :, 1:], feat_cache=states, feat_idx=[0]))
    return torch.cat(out, dim=2)


def to_pixels(videos: Tensor) -> Tensor:
    """Converts (B, T, H, W, 3) uint8 -> (B, 3, T, H, W) in -1..1, channels last in memory."""
    return (videos / 127.5 - 1).permute(0, 4, 1, 2, 3)


def save(vae: Any, folder: Path) -> None:
    """Writes the folder atomically."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    vae.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
