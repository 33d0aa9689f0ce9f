"""Attention of LongCat-Video's transformer: rotary positions, softmax attention, and Ulysses.

Shapes: B batch, N tokens (this process's share under context parallelism), H heads, D head size.
Ships with an export beside `transformer.py`; imports nothing else of this folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

    Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

ROPE_BASE = 10000.0


def rotary_tables(
    grid: tuple[int, int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Computes cos and sin of the 3-D rotary positions, each (T, H*W, D/2) float32.

    The head is split into time, height and width; height and width take 2*(D // 6) each
    (longcat_video/modules/rope_3d.py of the official code).
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, (length, dim) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        powers = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        positions = torch.arange(length, dtype=torch.float32, device=device)
        table = positions[:, None] * (1.0 / ROPE_BASE**powers)  # (length, dim/2)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        angles.append(table.view(shape).expand(*grid, dim // 2))
    flat = torch.cat(angles, dim=-1).flatten(1, 2)
    return flat.cos(), flat.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `x` (B, H, N, D), in the order of `rotate_half_order`, by the angles (N, D/2); the
    arithmetic is in float32."""
    even, odd = x.float().chunk(2, dim=-1)
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).type_as(x)


def rotate_half_order(rows: Tensor, head_dim: int) -> Tensor:
    """Puts the even rows of each head before the odd ones, (heads * D, ...) in and out.

    The official model rotates interleaved pairs, this one halves (rotate-half). q k^T is the same
    in any order of a head's channels, and reordering weights, not activations, lets a GPU read
    whole lines.
    """
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    cp_group: ProcessGroup | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Computes softmax(q k^T / sqrt(D)) v, (B, H, Nq, D); `key_mask` (B, Nk) is True where a key
    counts.

    `kernel` computes it in torch's place where it can: in bf16, without a mask.

    With `cp_group` each process comes with its tokens and all heads, and attends over all tokens
    with its heads (DeepSpeed Ulysses, arXiv 2309.14509). Any order of the tokens will do.
    """
    if cp_group is not None:
        q, k, v = (_tokens_to_heads(x, cp_group) for x in (q, k, v))
    if kernel is not None and key_mask is None and q.dtype == torch.bfloat16:
        out = kernel(q, k, v)
    else:
        mask = None if key_mask is None else key_mask[:, None, None, :].bool()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if cp_group is None else _heads_to_tokens(out, cp_group)


def _tokens_to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """Exchanges (B, H, N/P, D) of each of P processes -> (B, H/P, N, D)."""
    size = group.size()
    pieces = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # (P, B, H/P, N/P, D)
    pieces = _exchange(pieces, group)  # piece p: process p's tokens
    return pieces.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _heads_to_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """Exchanges (B, H/P, N, D) of each of P processes -> (B, H, N/P, D)."""
    size = group.size()
    pieces = x.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4).contiguous()  # (P, B, H/P, N/P, D)
    pieces = _exchange(pieces, group)  # piece p: process p's heads
    return pieces.transpose(0, 1).flatten(1, 2)


def _exchange(pieces: Tensor, group: ProcessGroup) -> Tensor:
    """Sends piece p to process p; (P, ...) in and out, with a gradient."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    flat = pieces.flatten()
    splits = [flat.numel() // group.size()] * group.size()
    return all_to_all_single_autograd(flat, splits, splits, group).view_as(pieces)


class GatherTokens(torch.autograd.Function):
    """Gathers (B, T, S/P, C) of each of P processes -> (B, T, S, C) on all.

    Every process continues with the same values and the same loss, so its own part of the gradient
    is all that it takes back; the sum over the processes is then the gradient of one loss.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # pyright: ignore
        import torch.distributed as dist

        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grad.chunk(ctx.group.size(), dim=2)[ctx.group.rank()].contiguous(), None
