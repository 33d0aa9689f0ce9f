"""`fp8_linears`: the large matmuls of each block in float8, with a scale a row.

Forward and both gradients are float8 matmuls accumulated in float32; weights, activations and
gradients are kept in bf16 and rounded each time, so no float8 state persists (the "rowwise"
recipe of torchao). The attention, the caption's keys and the modulation stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longcat_video_fft.model.float8 import FLOAT8, FLOAT8_MAX

if TYPE_CHECKING:
    from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel

LINEARS = (
    "attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "ffn.w1", "ffn.w2", "ffn.w3",
)  # fmt: skip


def use_fp8_linears(model: LongCatVideoTransformer3DModel) -> None:
    """Sets the matmuls of all blocks to float8; names and parameters stay.

    Raises:
        ValueError: a width is no multiple of 16.
    """
    for block in model.blocks:
        for name in LINEARS:
            linear: Any = block.get_submodule(name)
            if linear.in_features % 16 or linear.out_features % 16:
                raise ValueError(
                    f"fp8_linears: {name} is {linear.out_features} x {linear.in_features}; float8 "
                    "matmuls need multiples of 16. Set fp8_linears to false."
                )
            linear.matmul = float8_matmul


def float8_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x (..., K), weight (N, K), bias (N) -> x weight^T + bias (..., N)."""
    out = _Float8Matmul.apply(x.flatten(0, -2), weight)
    out = out.unflatten(0, x.shape[:-1])  # pyright: ignore
    return out if bias is None else out + bias


class _Float8Matmul(torch.autograd.Function):
    """Computes x (M, K), weight (N, K) -> x weight^T (M, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x, weight)
        return multiply(round_rows(x), round_rows(weight), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        if grad.is_cuda:
            from longcat_video_fft.model.fp8_kernels import round_both, round_columns

            *grad_rows, grad_columns, column_scale = round_both(grad)
            columns, x_columns = (grad_columns, column_scale), round_columns(x)
        else:
            grad_rows, columns, x_columns = (
                round_rows(grad), round_rows(grad.t()), round_rows(x.t()),
            )  # fmt: skip
        return (
            multiply(grad_rows, round_rows(weight.t()), x.dtype),
            multiply(columns, x_columns, weight.dtype),
        )


def multiply(a: Any, b: Any, dtype: torch.dtype) -> Tensor:
    """Multiplies a (M, K) by b (N, K) transposed; both are (float8, scale of each row)."""
    (a8, scale_a), (b8, scale_b) = a, b
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a8, b8.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=dtype, use_fast_accum=True
    )


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds (M, K) -> float8 (M, K), row-major, and the scale to multiply each row by, (M, 1)."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12 * FLOAT8_MAX) / FLOAT8_MAX
    return (x.float() / scale).to(FLOAT8).contiguous(), scale
