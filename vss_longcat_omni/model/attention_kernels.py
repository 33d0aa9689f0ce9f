"""Calls FlashAttention-4 for packed sequences, where the package flash-attn-4 is installed.

It needs Hopper or Blackwell, and bfloat16. One call takes all sequences of a pack, and queries and
keys of another width than values, as MLA has them.

Shapes: T packed tokens, A heads, D width of queries and keys, V width of values, S sequences.
"""

from __future__ import annotations

import functools
from importlib.metadata import distributions
from typing import Any

import torch
from torch import Tensor

FLASH4_GPUS = (9, 10)  # Hopper, Blackwell
FLASH4_WIDTHS = ((192, 128), (128, 128), (64, 64))  # (D, V) that both of them have


def can_use_flash4(q: Tensor, v: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype == torch.bfloat16
        and (q.shape[-1], v.shape[-1]) in FLASH4_WIDTHS
        and _is_ready(q.device)
    )


@functools.cache
def _is_ready(device: torch.device) -> bool:
    is_new = torch.cuda.get_device_capability(device)[0] in FLASH4_GPUS
    return is_new and any(distributions(name="flash-attn-4"))


class Flash4(torch.autograd.Function):
    """Attends causally: q, k (T, A, D), v (T, A, V), bounds (S + 1,) int32 -> (T, A, V)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float
    ) -> Tensor:
        from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore

        options = _options(bounds, longest, scale)
        out, log_sums = _flash_attn_fwd(q, k, v, return_lse=True, **options)[:2]
        ctx.save_for_backward(q, k, v, out, log_sums, bounds)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore

        q, k, v, out, log_sums, bounds = ctx.saved_tensors
        options = _options(bounds, ctx.longest, ctx.scale)
        grad = grads[0].contiguous()
        grad_q, grad_k, grad_v = _flash_attn_bwd(q, k, v, out, grad, log_sums, **options)[:3]
        return grad_q, grad_k, grad_v, None, None, None


def _options(bounds: Tensor, longest: int, scale: float) -> dict[str, Any]:
    return {
        "softmax_scale": scale, "causal": True, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds,
        "max_seqlen_q": longest, "max_seqlen_k": longest,
    }  # fmt: skip
