"""Encodes patches by LongCat-ViT, projects and pools them to inputs of the language model.

Takes what `pixels.to_patches` makes; `model/omni.py` puts the result in place of the image pads.
Names and order of operations follow encoders/vision_adaptor.py and encoders/utils.py of
meituan-longcat/LongCat-Flash-Omni: the released vision/vision_model.pt and vision_projector.pt are
the state dicts of `VisionEncoder` and `VisionProjector`. Tests hold both against the official code.

All items (pictures, frame pairs) lie one after the other in one sequence of N patches; each attends
to itself alone. Grids are lists on the host, so that no value is read back from the device.

N patches of all items, B items of one length S in a run, C width, H heads, D = C/H.
A grid is (t, h, w) in patches; a pooled grid (h, w), its width not yet halved.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.media.pixels import Grid, PooledGrid

Run = tuple[int, int]  # (B, S): so many items of so many patches each, side by side
# Kept by the official config for variants that its code does not support.
FIXED_SETTINGS = {"hidden_act": "SwiGLU", "pe_type": "rope2d"}


@dataclass(frozen=True)
class VisionConfig:
    """Has official names and released values (technical report, Table 1; the rest: the code's own).

    `adaptor_dim` is the official default, since the released vision/config.json is not public.
    `proj_output_dim`, the width of the language model, is not in that file.
    """

    hidden_size: int = 1280
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    intermediate_size: int = 5184  # two thirds of it are used: `mlp_inner_dim`
    patch_size: int = 14
    temporal_patch_size: int = 2
    num_channels: int = 3
    spatial_merge_size: int = 1
    patch_embedding_bias: bool = True
    qk_normalization: bool = True
    qkv_bias: bool = False
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_factor: float = 0.1  # layer scales at the start
    adaptor_dim: int = 7168
    proj_output_dim: int = 6144

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int) and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{field.name}={value!r}: set a whole number")
        heads = self.num_attention_heads
        if self.hidden_size % heads or self.hidden_size // heads % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} and num_attention_heads={heads}: the head size "
                "must be a whole multiple of 4 (pairs of rows, pairs of columns)"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> VisionConfig:
        """Read the keys of the official vision/config.json; those of other modules are left aside.

        Raises ValueError, with `source`, for a variant that is unsupported.
        """
        for name, only in FIXED_SETTINGS.items():
            if values.get(name, only) != only:
                raise ValueError(f"{source}: {name}={values[name]}: only {only} is supported")
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @property
    def mlp_inner_dim(self) -> int:
        return int(self.intermediate_size * 2 / 3)

    @property
    def patch_dim(self) -> int:
        """Return the size of a row of `pixel_values`: (channel, frame in the pair, row, column)."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2


class RMSNorm(nn.Module):
    """Normalizes the last dimension in float32; scales in the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class PatchEmbedding(nn.Conv3d):
    """Embeds patches by a matmul, the convolution being slow; in the module that owns the weight,
    where ZeRO-3 gathers it."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed (N, patch_dim) to (N, C), in the weight's dtype."""
        return F.linear(input.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embedding = PatchEmbedding(
            config.num_channels, config.hidden_size, size, size, bias=config.patch_embedding_bias
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.patch_embedding(pixel_values)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        normed = config.qk_normalization
        self.q_norm = RMSNorm(dim, config.layer_norm_eps) if normed else None
        self.k_norm = RMSNorm(dim, config.layer_norm_eps) if normed else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: list[Run]) -> Tensor:
        """Attend, (N, C) to (N, C); cos and sin (N, D/2) float32."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # (N, H, D) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.q_norm is not None and self.k_norm is not None:
            # Over all heads together, and behind the rotation.
            q = self.q_norm(q.flatten(1)).view_as(q)
            k = self.k_norm(k.flatten(1)).view_as(k)
        return self.proj(attend(q, k, v, runs).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        inner = config.mlp_inner_dim
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)
        self.fc3 = nn.Linear(config.hidden_size, inner)
        self.norm = RMSNorm(inner, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1(x)) * self.fc3(x)))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.attn = VisionAttention(config)
        self.norm1 = RMSNorm(dim, config.layer_norm_eps)
        self.norm2 = RMSNorm(dim, config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.ls1 = nn.Parameter(torch.full((dim,), config.initializer_factor))
        self.ls2 = nn.Parameter(torch.full((dim,), config.initializer_factor))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: list[Run]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, runs) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class VisionLayers(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: list[Run]) -> Tensor:
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(  # pyright: ignore[reportAssignmentType]
                    layer, x, cos, sin, runs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = layer(x, cos, sin, runs)
        return x


class VisionEncoder(nn.Module):
    """LongCat-ViT; 637M parameters at the released config. Nothing normalizes the last layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionLayers(config)

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Keep the layers' inputs alone for the backward pass and compute the rest again."""
        self.encoder.gradient_checkpointing = enabled

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Encode (N, patch_dim) to (N, C). Raises ValueError where grids do not fit the patches."""
        config = self.config
        lengths = [t * h * w for t, h, w in grids]
        if pixel_values.ndim != 2 or pixel_values.shape[1] != config.patch_dim:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: give (N, {config.patch_dim})"
            )
        if not lengths or sum(lengths) != len(pixel_values):
            raise ValueError(
                f"{len(pixel_values)} patches for {len(lengths)} grids of {sum(lengths)} in all: "
                "give the grids that to_patches returned with them"
            )
        angles = rotary_angles(grids, config, pixel_values.device)
        x = self.embeddings(pixel_values)
        return self.encoder(x, angles.cos(), angles.sin(), equal_runs(lengths))


class VisionProjector(nn.Module):
    """Joins two neighbors of a row and takes them to the width of the language model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        joined, dim = 2 * config.hidden_size, config.adaptor_dim
        self.p0 = nn.Sequential(
            nn.LayerNorm(joined), nn.Linear(joined, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU()
        )
        self.proj = nn.Linear(dim, config.proj_output_dim)

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Project (N, C) to (N/2, proj_output_dim).

        Raises ValueError for a grid with t != 1 (each frame pair is an item of its own) or of odd
        width.
        """
        for grid in grids:
            if grid[0] != 1 or grid[2] % 2:
                raise ValueError(f"grid {tuple(grid)}: the projector takes t = 1 and an even width")
        return self.proj(self.p0(features.reshape(len(features) // 2, -1)))


def pool_features(
    features: Tensor, grids: Sequence[Grid], pooled_grids: Sequence[PooledGrid]
) -> Tensor:
    """Pool projected features (N/2, E) item by item, bilinearly; unchanged where grids agree.

    Raises ValueError where the three do not belong together.
    """
    sizes = [(h, w // 2) for _, h, w in grids]
    targets = [(h, w // 2) for h, w in pooled_grids]
    if len(sizes) != len(targets) or sum(h * w for h, w in sizes) != len(features):
        raise ValueError(
            f"{len(features)} vision tokens, {len(sizes)} grids and {len(targets)} pooled grids "
            "do not belong together: give one pooled grid for each unit"
        )
    runs = [
        (size, target, len(list(items)))
        for (size, target), items in groupby(zip(sizes, targets, strict=True))
    ]
    pooled = []
    parts = features.split([count * h * w for (h, w), _, count in runs])
    for part, (size, target, count) in zip(parts, runs, strict=True):
        if size != target:
            maps = part.unflatten(0, (count, *size)).permute(0, 3, 1, 2)  # (B, E, h, w)
            maps = F.interpolate(maps, size=target, mode="bilinear")
            part = maps.permute(0, 2, 3, 1).flatten(0, 2)
        pooled.append(part)
    return torch.cat(pooled)


def rotary_angles(grids: Sequence[Grid], config: VisionConfig, device: torch.device) -> Tensor:
    """Return (N, D/2) float32: D/4 angles of the patch's row, D/4 of its column, whatever t is.

    Float32 whatever the model's dtype is: the official demo casts its frequencies to bfloat16 with
    the weights, where rows above 256 collapse, though grids reach 728.
    """
    half = config.hidden_size // config.num_attention_heads // 2
    powers = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequencies = 1.0 / config.rope_theta**powers  # (D/4,)
    parts = []
    for (t, h, w), items in groupby(grids, key=tuple):
        count = t * len(list(items))
        rows, columns = (
            torch.arange(n, dtype=torch.float32, device=device)[:, None] * frequencies
            for n in (h, w)
        )
        angles = torch.cat(
            (rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)), dim=-1
        )  # (h, w, D/2)
        angles = _in_blocks(angles, config.spatial_merge_size)
        parts.append(angles.expand(count, -1, -1).flatten(0, 1))
    return torch.cat(parts)


def _in_blocks(x: Tensor, side: int) -> Tensor:
    """Reorder (h, w, ...) to (h*w, ...), block after block of side x side patches."""
    x = x.unflatten(1, (-1, side)).unflatten(0, (-1, side))  # (h/s, s, w/s, s, ...)
    return x.transpose(1, 2).flatten(0, 3)


def equal_runs(lengths: Sequence[int]) -> list[Run]:
    """Group neighbors of one length: the units of a video are one run."""
    return [(len(list(items)), length) for length, items in groupby(lengths)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of `x` (N, H, D) by angles (N, D/2) (rotate-half); float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, runs: list[Run]) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v of (N, H, D), each item by itself; one call a run."""
    counts = [count * length for count, length in runs]
    out = []
    for run, *qkv in zip(runs, *(x.split(counts) for x in (q, k, v)), strict=True):
        batch = (x.unflatten(0, run).transpose(1, 2) for x in qkv)  # (B, H, S, D) each
        out.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)
