"""Computes multi-head latent attention (MLA) over packed sequences, as LongCat-Flash has it.

Two low-rank projections: queries through `q_lora_rank`, keys and values through one latent of
`kv_lora_rank` that all heads share, beside one rotary key. Both are scaled by
sqrt(hidden_size / rank) (transformers: `LongcatFlashMLA`).

Shapes: T packed tokens, L cached tokens, H hidden size, A heads, N width of a head without
position, R its rotary width, V width of its values, C the latent's width (`kv_lora_rank`), S packed
sequences, P tokens of a padded one.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vss_longcat_omni.model.attention_kernels import Flash4, can_use_flash4
from vss_longcat_omni.model.fused import fused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.model.config import LongcatOmniConfig

# Without FlashAttention-4, best first.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
MAX_PADDED = 1.5  # times the tokens, what they may become by padding
PAD_MULTIPLE = 64  # few shapes: cuDNN plans each one
LATENT_NORM_EPS = 1e-6  # not the config's rms_norm_eps: these two norms keep the class's default


@dataclass
class LatentCache:
    """Holds what one attention sublayer keeps of the tokens so far: C + R numbers a token."""

    latents: Tensor | None = None  # (L, C), normed and scaled
    rotary_keys: Tensor | None = None  # (L, R)

    def append(self, latents: Tensor, rotary_keys: Tensor) -> None:
        if self.latents is not None and self.rotary_keys is not None:
            latents = torch.cat([self.latents, latents])
            rotary_keys = torch.cat([self.rotary_keys, rotary_keys])
        self.latents, self.rotary_keys = latents, rotary_keys


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LongcatFlashMLA(nn.Module):
    def __init__(self, config: LongcatOmniConfig) -> None:
        super().__init__()
        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        self.num_heads = num_heads
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_head_dim, self.kv_lora_rank = config.v_head_dim, config.kv_lora_rank
        qk_head_dim = self.nope_dim + self.rope_dim
        bias = config.attention_bias
        self.q_a_proj = nn.Linear(hidden_size, config.q_lora_rank, bias=bias)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
        self.q_b_proj = nn.Linear(config.q_lora_rank, num_heads * qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden_size, config.kv_lora_rank + self.rope_dim, bias=bias
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, num_heads * (self.nope_dim + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, hidden_size, bias=bias)
        self.q_scale = (hidden_size / config.q_lora_rank) ** 0.5
        self.kv_scale = (hidden_size / config.kv_lora_rank) ** 0.5
        self.softmax_scale = qk_head_dim**-0.5

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        lengths: Sequence[int],
        cache: LatentCache | None = None,
    ) -> Tensor:
        """Attend, (T, H) to (T, H); each packed sequence, of these `lengths`, sees itself alone.

        With a `cache`, x continues the one sequence that is in it.
        """
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.num_heads, -1))
        q = rotate_queries(q, *rotation, self.nope_dim, self.q_scale)  # (T, A, N + R)
        latents, k_rope = self.kv_a_proj_with_mqa(x).split(
            [self.kv_lora_rank, self.rope_dim], dim=-1
        )
        latents = self.kv_a_layernorm(latents) * self.kv_scale  # (T, C)
        k_rope = rotate(k_rope[:, None], *rotation)[:, 0]  # (T, R)
        if cache is not None:
            has_past = cache.latents is not None
            cache.append(latents, k_rope)
            if has_past:
                return self.o_proj(self._attend_latents(q, cache))
        k, v = expand_keys(self._expand(latents), k_rope, self.nope_dim)
        return self.o_proj(attend(q, k, v, lengths, scale=self.softmax_scale).flatten(1))

    def _expand(self, latents: Tensor) -> Tensor:
        """Expand (T, C) to (T, A, N + V): the keys' part without position, and the values."""
        return self.kv_b_proj(latents).unflatten(-1, (self.num_heads, -1))

    def _attend_latents(self, q: Tensor, cache: LatentCache) -> Tensor:
        """Return (T, A * V) for the last T cached tokens, without keys and values of the others.

        q (W_k c) = (W_k^T q) c: the latents themselves serve as keys and values of one shared head.
        kv_b_proj of the unit matrix is its weight, transposed, whatever adapter is on it.
        """
        latents, rotary_keys = cache.latents, cache.rotary_keys
        assert latents is not None
        assert rotary_keys is not None
        unit = torch.eye(self.kv_lora_rank, dtype=latents.dtype, device=latents.device)
        w_keys, w_values = self._expand(unit).tensor_split([self.nope_dim], dim=-1)
        q_nope, q_rope = q.tensor_split([self.nope_dim], dim=-1)
        q = torch.cat([torch.einsum("tan,can->tac", q_nope, w_keys), q_rope], dim=-1)
        k = torch.cat([latents, rotary_keys], dim=-1)
        num_new, num_all = len(q), len(k)
        mask = torch.ones(num_new, num_all, dtype=torch.bool, device=q.device)
        mask = mask.tril(num_all - num_new)
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1),  # (A, T, C + R)
            k.expand(self.num_heads, -1, -1),
            latents.expand(self.num_heads, -1, -1),
            attn_mask=mask,
            scale=self.softmax_scale,
        )  # (A, T, C)
        return torch.einsum("atc,cav->tav", mixed, w_values).flatten(1)


@fused
def rotate_queries(q: Tensor, cos: Tensor, sin: Tensor, nope_dim: int, scale: float) -> Tensor:
    """Scale (T, A, N + R) and rotate the last R."""
    q_nope, q_rope = (q * scale).tensor_split([nope_dim], dim=-1)
    return torch.cat([q_nope, rotate(q_rope, cos, sin)], dim=-1)


@fused
def expand_keys(expanded: Tensor, k_rope: Tensor, nope_dim: int) -> tuple[Tensor, Tensor]:
    """Return keys (T, A, N + R) and values (T, A, V) from (T, A, N + V) and the common (T, R)."""
    k_nope, values = expanded.tensor_split([nope_dim], dim=-1)
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, expanded.shape[1], -1)], dim=-1)
    return k, values.contiguous()  # a view would give the backward two gradients to add


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float) -> Tensor:
    """Attend causally in each packed sequence: q, k (T, A, N + R), v (T, A, V) -> (T, A, V).

    Without FlashAttention-4 sequences of similar lengths are padded to the longest, others take one
    call each: the block-diagonal mask of a pack would cost the square of its length.
    """
    if can_use_flash4(q, v):
        bounds = compute_bounds(tuple(lengths), q.device)
        return Flash4.apply(q, k, v, bounds, max(lengths), scale)
    longest = -(-max(lengths) // PAD_MULTIPLE) * PAD_MULTIPLE
    if len(lengths) > 1 and len(lengths) * longest <= MAX_PADDED * len(q):
        places = compute_places(tuple(lengths), longest, q.device)
        padded = (pad(x, places, (len(lengths), longest)) for x in (q, k, v))
        return attend_padded(*padded, scale=scale).flatten(0, 1).index_select(0, places)
    each = zip(*(x[None].split(list(lengths), dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([attend_padded(*one, scale=scale) for one in each], dim=1)[0]


def attend_padded(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attend: q, k (S, P, A, N + R), v (S, P, A, V) -> (S, P, A, V). What pads a sequence comes
    after all that is real, so nothing attends to it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(BACKENDS, set_priority=True):
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return mixed.transpose(1, 2)


def pad(x: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pad (T, A, D) to (S, P, A, D) with zeros where no token is."""
    padded = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
    return padded.index_copy(0, places, x).unflatten(0, shape)


@functools.lru_cache(maxsize=4)
def compute_places(lengths: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """Return (T,), where each token lies among sequences padded to `longest`."""
    starts = range(0, longest * len(lengths), longest)
    places = [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    return torch.cat(places).to(device)


@functools.lru_cache(maxsize=4)
def compute_bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (S + 1,) int32, where S packed sequences begin and end. It is copied to the device
    once a pack, not in each attention: the copy waits for the GPU."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def compute_rotation(
    position_ids: Tensor, rope_dim: int, rope_theta: float
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, (T, 1, R / 2) float32, of the positions (T,)."""
    exponents = torch.arange(0, rope_dim, 2, device=position_ids.device).float() / rope_dim
    angles = position_ids[:, None, None].float() / rope_theta**exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of x (T, A, R) in float32.

    The pairs' first members come out before the second ones, in queries and keys alike.
    """
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)
