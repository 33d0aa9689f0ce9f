"""The small layers of LongCat-Video's transformer: norms, embedders, feed-forward.

Names and precision as in transformer.py, which uses them and gives the shapes.
Ships with an export beside `transformer.py`; imports nothing else of this folder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class RMSNorm(nn.Module):
    """Normalizes the last dimension in float32; scales in the input's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight)

    @staticmethod
    def normalize(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return normed.type_as(x) * weight


class LayerNorm(nn.LayerNorm):
    """Normalizes in float32 and returns the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, EPS).type_as(input)


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Applies `layer` in float32 arithmetic, whatever dtype its weights have."""
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), layer.weight.float(), bias)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalizes (B, T, S, C) and shifts and scales it by (B, T, 1, C), in float32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return (normed * (scale + 1) + shift).type_as(x)


class Linear(nn.Linear):
    """A linear layer whose matmul can be called with reordered weights, or replaced for a layer."""

    matmul = staticmethod(F.linear)  # (x, weight, bias); `fp8.use_fp8_linears` sets another

    def forward(self, input: Tensor) -> Tensor:
        return self.matmul(input, self.weight, self.bias)


class PatchEmbed3D(nn.Module):
    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds (B, 16, T, h, w) -> (B, T, S, C) by a matmul of patches: a convolution is slow."""
        _, ph, pw = self.proj.kernel_size
        patches = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph))  # (B, c, T, h, ph, w, pw)
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)  # (B, T, S, c*p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, frequency_embedding_size: int) -> None:
        super().__init__()
        self.num_waves = frequency_embedding_size // 2
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, dim), nn.SiLU(), nn.Linear(dim, dim)
        )

    def forward(self, timestep: Tensor) -> Tensor:
        """Embeds (B, T) in 0..1000 -> (B, T, adaln_tembed_dim) float32; cosines before sines."""
        powers = torch.arange(self.num_waves, dtype=torch.float32, device=timestep.device)
        angles = timestep.float()[..., None] * torch.exp(
            -math.log(10000.0) / self.num_waves * powers
        )
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return linear_fp32(self.mlp[2], F.silu(linear_fp32(self.mlp[0], waves)))  # pyright: ignore


class CaptionEmbedder(nn.Module):
    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.y_proj = nn.Sequential(
            nn.Linear(in_channels, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)


class FeedForward(nn.Module):
    """Computes SwiGLU; the inner width is 2/3 of the asked one, rounded up to a multiple of 256."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        inner = 256 * math.ceil(int(2 * hidden_dim / 3) / 256)
        self.w1 = Linear(dim, inner, bias=False)
        self.w2 = Linear(inner, dim, bias=False)
        self.w3 = Linear(dim, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
