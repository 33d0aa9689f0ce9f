"""The small layers of LongCat-Video's transformer: norms, embedders, feed-forward.

Names and precision as in transformer.py, which uses them and tells the shapes.
Ships with an export beside `transformer.py`; imports nothing else of this folder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class RMSNorm(nn.Module):
    """Over the last dimension, in float32; scaled in the input's dtype."""

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
    """In float32, back in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, EPS).type_as(input)


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` with float32 arithmetic whatever its weights are kept in."""
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), layer.weight.float(), bias)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalises (B, T, S, C) and shifts and scales it by (B, T, 1, C), in float32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return (normed * (scale + 1) + shift).type_as(x)


class Linear(nn.Linear):
    """Its product can be asked for with its weights in another order."""

    product = staticmethod(F.linear)  # (x, weight, bias); `fp8.Float8Linear` has its own

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)


class PatchEmbed3D(nn.Module):
    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 16, T, h, w) -> (B, T, S, C). As a product of patches: the convolution is slow."""
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
        """(B, T) in 0..1000 -> (B, T, adaln_tembed_dim) float32; cosines before sines."""
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
    """SwiGLU; the inner width is 2/3 of the asked one, rounded up to a multiple of 256."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        inner = 256 * math.ceil(int(2 * hidden_dim / 3) / 256)
        self.w1 = nn.Linear(dim, inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)
        self.w3 = nn.Linear(dim, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
