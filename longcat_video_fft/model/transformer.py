"""LongCat-Video's transformer: noisy latents, timestep and caption -> clean minus noise.

Parameter names, order of operations and precision follow meituan-longcat/LongCat-Video,
longcat_video/modules/longcat_video_dit.py, so that released weights load as they are; tests hold it
against outputs and gradients of the official code. Written for one compiled graph a block: a fixed
number of text keys, no value ever read by the host.

B batch, T latent frames, S patches a frame, N = T*S tokens, L text tokens, C width, H heads,
D = C/H.
Ships with an export beside `attention.py` and `layers.py`; imports nothing else of this folder.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longcat_video_fft.model.attention import (
    GatherTokens,
    attend,
    rotary_tables,
    rotate,
    rotate_half_order,
)
from longcat_video_fft.model.layers import (
    EPS,
    CaptionEmbedder,
    FeedForward,
    LayerNorm,
    Linear,
    PatchEmbed3D,
    RMSNorm,
    TimestepEmbedder,
    linear_fp32,
    modulate,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup


class Attention(nn.Module):
    """Attends over a video's tokens. Condition tokens see each other only; the others see all."""

    cp_group: ProcessGroup | None = None
    kernel: Callable[..., Tensor] | None = None

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, num_cond: int) -> Tensor:
        """Attends, (B, N, C) in and out; cos and sin (N, D/2); the first `num_cond` tokens are
        clean."""
        head_dim, width = 2 * cos.shape[-1], self.proj.in_features
        weight, bias = (
            torch.cat((rotate_half_order(p[: 2 * width], head_dim), p[2 * width :]))
            for p in (self.qkv.weight, self.qkv.bias)
        )
        qkv = self.qkv.matmul(x, weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
        q = RMSNorm.normalize(q, rotate_half_order(self.q_norm.weight, head_dim))
        k = RMSNorm.normalize(k, rotate_half_order(self.k_norm.weight, head_dim))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        how: dict[str, Any] = {"cp_group": self.cp_group, "kernel": self.kernel}
        if num_cond == 0:
            out = attend(q, k, v, **how)
        else:
            out_clean = attend(*(t[:, :, :num_cond] for t in (q, k, v)), **how)
            out_noise = attend(q[:, :, num_cond:], k, v, **how)
            out = torch.cat((out_clean, out_noise), dim=2)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attends from video tokens to the caption's; condition tokens take nothing from it."""

    kernel: Callable[..., Tensor] | None = None

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)

    def forward(self, x: Tensor, y: Tensor, key_mask: Tensor | None, num_cond: int) -> Tensor:
        """Computes (B, N, C), (B, L, C), (B, L) or None -> (B, N, C)."""
        q = self.q_linear(x[:, num_cond:]).unflatten(-1, (self.num_heads, -1))  # (B, N, H, D)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # (B, L, H, D)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = attend(q, k, v, key_mask=key_mask, kernel=self.kernel)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return F.pad(out, (0, 0, num_cond, 0)) if num_cond else out


class LongCatSingleStreamBlock(nn.Module):
    """A block is self-attention, cross-attention, feed-forward; modulated by each frame's timestep.

    `checkpoint_context`: None keeps all activations; a function as torch's `context_fn` recomputes
    what it does not keep. `compile_block` compiles the work; hooks of FSDP stay outside of it.
    """

    checkpoint_context: Callable[[], Any] | None = None

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, adaln_tembed_dim: int
    ) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(adaln_tembed_dim, 6 * hidden_size)
        )
        self.pre_crs_attn_norm = LayerNorm(hidden_size, eps=EPS)
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.ffn = FeedForward(hidden_size, int(hidden_size * mlp_ratio))
        self.work: Callable[..., Tensor] = self._work

    def forward(self, *inputs: Any) -> Tensor:
        """Runs `_work`, compiled or not."""
        return self.work(*inputs)

    def compile_block(self) -> None:
        self.work = torch.compile(self._work, fullgraph=True, dynamic=False)

    def _work(self, *inputs: Any) -> Tensor:
        if self.checkpoint_context is None or not torch.is_grad_enabled():
            return self._layers(*inputs)
        return checkpoint(  # pyright: ignore[reportReturnType]
            self._layers, *inputs, use_reentrant=False, preserve_rng_state=False,
            context_fn=self.checkpoint_context,
        )  # fmt: skip

    def _layers(
        self,
        x: Tensor,  # (B, T, S, C)
        y: Tensor,  # (B, L, C)
        t: Tensor,  # (B, T, adaln_tembed_dim) float32
        key_mask: Tensor | None,  # (B, L)
        cos: Tensor,  # (N, D/2)
        sin: Tensor,
        num_cond_latents: int,
    ) -> Tensor:
        modulation = linear_fp32(self.adaLN_modulation[1], F.silu(t))  # pyright: ignore
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unsqueeze(
            2
        ).chunk(6, dim=-1)  # (B, T, 1, C) each
        num_cond = num_cond_latents * x.shape[2]
        tokens = modulate(x, shift_msa, scale_msa).flatten(1, 2)  # (B, N, C)
        out = self.attn(tokens, cos, sin, num_cond).view_as(x)
        x = (x + gate_msa * out).type_as(x)
        tokens = self.pre_crs_attn_norm(x).flatten(1, 2)
        x = x + self.cross_attn(tokens, y, key_mask, num_cond).view_as(x)
        out = self.ffn(modulate(x, shift_mlp, scale_mlp))
        return (x + gate_mlp * out).type_as(x)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int, adaln_tembed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(adaln_tembed_dim, 2 * hidden_size)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Projects (B, T, S, C) -> (B, T, S, patch * channels) float32."""
        modulation = linear_fp32(self.adaLN_modulation[1], F.silu(t))  # pyright: ignore
        shift, scale = modulation.unsqueeze(2).chunk(2, dim=-1)
        return linear_fp32(self.linear, modulate(x, shift, scale))


class LongCatVideoTransformer3DModel(ModelMixin, ConfigMixin):
    """The model has 13,581,071,424 parameters at the released config, which sets
    text_tokens_zero_pad.

    The options from `enable_flashattn3` to `cp_split_hw` are the official config's and only kept:
    `set_attention_kernel` chooses the kernel, `set_context_parallel` the parallelism.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        hidden_size: int = 4096,
        depth: int = 48,
        num_heads: int = 32,
        caption_channels: int = 4096,
        mlp_ratio: float = 4,
        adaln_tembed_dim: int = 512,
        frequency_embedding_size: int = 256,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        enable_flashattn3: bool = False,
        enable_flashattn2: bool = False,
        enable_xformers: bool = False,
        enable_bsa: bool = False,
        bsa_params: dict[str, Any] | None = None,
        cp_split_hw: list[int] | None = None,
        text_tokens_zero_pad: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or hidden_size // num_heads % 8:
            raise ValueError(
                f"hidden_size={hidden_size} and num_heads={num_heads}: the head size must be a "
                "whole multiple of 8."
            )
        if patch_size[0] != 1:
            raise ValueError(f"patch_size={patch_size}: frames are not joined, so it begins by 1.")
        self.head_dim = hidden_size // num_heads
        self.x_embedder = PatchEmbed3D(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(adaln_tembed_dim, frequency_embedding_size)
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size)
        self.blocks = nn.ModuleList(
            LongCatSingleStreamBlock(hidden_size, num_heads, mlp_ratio, adaln_tembed_dim)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(
            hidden_size, math.prod(patch_size) * out_channels, adaln_tembed_dim
        )
        self.cp_group: ProcessGroup | None = None

    def set_attention_kernel(self, kernel: Callable[..., Tensor] | None) -> None:
        """Computes attention by `kernel` where it can, else as torch chooses (`attend`)."""
        for block in self.blocks:
            block.attn.kernel = block.cross_attn.kernel = kernel  # pyright: ignore

    def set_context_parallel(self, group: ProcessGroup) -> None:
        """Shares the patches of each frame out to the group's processes.

        All come with the same whole inputs and leave with the same whole output.
        """
        self.cp_group = group
        for block in self.blocks:
            block.attn.cp_group = group  # pyright: ignore

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        num_cond_latents: int = 0,
    ) -> Tensor:
        """Predicts clean minus noise, (B, 16, T, h, w) float32.

        Args:
            hidden_states: (B, 16, T, h, w) noisy latents, the first `num_cond_latents` clean.
            timestep: (B,), or (B, T) with 0 for clean frames; 0..1000, that is 1000 sigma.
            encoder_hidden_states: (B, 1, L, caption_channels) states of the text encoder.
            encoder_attention_mask: (B, L), 0 behind a caption's end. Where the config sets
                text_tokens_zero_pad these become zero keys that count; else they are left out.
        """
        _, _, frames, height, width = hidden_states.shape
        rows, columns = self.patch
        grid = (frames, height // rows, width // columns)
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, frames)
        dtype = self.x_embedder.proj.weight.dtype
        x = self.x_embedder(hidden_states.to(dtype))  # (B, T, S, C)
        # The official code rounds timesteps to the model's dtype; in bf16 that is to steps of 4.
        t = self.t_embedder(timestep.to(dtype))  # (B, T, adaln_tembed_dim)
        y = self.y_embedder(encoder_hidden_states.to(dtype)).squeeze(1)  # (B, L, C)
        key_mask = encoder_attention_mask
        if key_mask is not None and self.config["text_tokens_zero_pad"]:
            y = y * key_mask[..., None].to(dtype)
            key_mask = None
        cos, sin = rotary_tables(grid, self.head_dim, x.device)  # (T, S, D/2)
        if self.cp_group is not None:
            x, cos, sin = (self._own_part(v, v.ndim - 2) for v in (x, cos, sin))
        cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        for block in self.blocks:
            x = block(x, y, t, key_mask, cos, sin, num_cond_latents)
        x = self.final_layer(x, t)
        if self.cp_group is not None:
            x = GatherTokens.apply(x, self.cp_group)  # pyright: ignore
        return self.unpatchify(x, grid)

    @property
    def patch(self) -> tuple[int, int]:
        """Returns height and width of a patch in latents."""
        return tuple(self.config["patch_size"][1:])

    def _own_part(self, x: Tensor, dim: int) -> Tensor:
        assert self.cp_group is not None
        size = self.cp_group.size()
        if x.shape[dim] % size:
            raise ValueError(
                f"context_parallel_size={size} does not divide a frame's {x.shape[dim]} patches."
            )
        return x.chunk(size, dim)[self.cp_group.rank()].contiguous()

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Reorders (B, T, S, ph*pw*c) -> (B, c, T, h, w)."""
        frames, rows, columns = grid
        ph, pw = self.patch
        x = x.unflatten(3, (ph, pw, -1)).unflatten(2, (rows, columns))
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # (B, c, T, rows, ph, columns, pw)
        return x.reshape(len(x), -1, frames, rows * ph, columns * pw)
