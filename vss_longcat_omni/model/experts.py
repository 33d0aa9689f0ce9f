"""Computes the mixture of experts: a router, 512 gated MLPs, 256 experts that return their input.

Rows are sorted by expert and multiplied in one grouped matmul; the identity experts come last and
are not computed. Nothing waits for the GPU: the number of rows is that of all picks, and those of
the identity experts hold rubbish that is never added.

Shapes: T tokens, K picks a token, P = T * K rows, E experts with weights, H hidden size, I inner
width of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss_longcat_omni.model.fused import fused

if TYPE_CHECKING:
    from collections.abc import Callable

    from vss_longcat_omni.model.config import LongcatOmniConfig


class LongcatFlashMoE(nn.Module):
    def __init__(self, config: LongcatOmniConfig) -> None:
        super().__init__()
        self.router = LongcatFlashRouter(config)
        self.experts = LongcatFlashExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        """Mix experts: (T, H) -> (T, H)."""
        return self.experts(x, *self.router(x))


class Float32Linear(nn.Linear):
    """Multiplies in float32, whatever the weight is stored in."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())


class LongcatFlashRouter(nn.Module):
    """Chooses by score plus correction, weighs by score alone: the bias balances the load."""

    def __init__(self, config: LongcatOmniConfig) -> None:
        super().__init__()
        self.top_k = config.moe_topk
        self.scale = config.routed_scaling_factor
        num_choices = config.n_routed_experts + config.zero_expert_num
        self.classifier = Float32Linear(config.hidden_size, num_choices, bias=False)
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(num_choices))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move, but do not round the correction: DeepSpeed casts buffers to bfloat16 too."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != exact.dtype:
            self.e_score_correction_bias = exact.to(moved.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose for (T, H) experts (T, K), and weights (T, K) float32, not renormalized."""
        scores = self.classifier(x).softmax(dim=-1)
        chosen = (scores + self.e_score_correction_bias).topk(self.top_k, sorted=False).indices
        return chosen, scores.gather(1, chosen) * self.scale


class LongcatFlashExperts(nn.Module):
    """Has in `gate_up_proj` an entry for each expert with weights, not for identity experts."""

    def __init__(self, config: LongcatOmniConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        hidden_size, width = config.hidden_size, config.expert_ffn_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Compute the chosen experts: (T, H), (T, K), (T, K) -> (T, H)."""
        top_k = chosen.shape[1]
        sorted_experts, order = chosen.flatten().sort(stable=True)  # (P,)
        expert_ids = torch.arange(self.num_experts, device=x.device)
        ends = torch.searchsorted(sorted_experts, expert_ids, right=True, out_int32=True)  # (E,)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=x.device)
        slots = slots.unflatten(0, (-1, top_k))  # (T, K): the row of each pick
        has_weights = chosen < self.num_experts

        row_weights = weights.flatten()[order].where(sorted_experts < self.num_experts, 0)
        rows = _Spread.apply(x, order // top_k, slots, has_weights)  # (P, H)
        rows = grouped_linear(rows, self.gate_up_proj, ends)  # (P, 2 I)
        # The weight may come before the second matmul, which is linear: I numbers, not H.
        rows = grouped_linear(gate(rows, row_weights), self.down_proj, ends)  # (P, H)
        from_identity = weights.masked_fill(has_weights, 0).sum(dim=1, keepdim=True)
        return _Sum.apply(rows, order // top_k, slots, has_weights) + x * from_identity.to(x.dtype)


@fused
def gate(gate_up: Tensor, weights: Tensor) -> Tensor:
    """Compute SiLU(gate) * up * weight: (P, 2 I), (P,) -> (P, I)."""
    gates, ups = gate_up.chunk(2, dim=-1)
    return F.silu(gates) * ups * weights[:, None].to(gate_up.dtype)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows [ends[e-1], ends[e]) of (P, in) by weight[e] (E, out, in); others: undefined.

    The backward is written out because autograd would keep a transposed view of the weight: under
    ZeRO-3 its 25.8 GB would then stay when the layer's weights are released.
    """
    if torch.is_autocast_enabled(rows.device.type):  # it does not cast for functions of our own
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    return _GroupedLinear.apply(rows, weight, ends)


def grouped_matmul(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows [ends[e-1], ends[e]) of (P, in) by matrices[e] (E, in, out); others: undefined.

    One kernel does it where there is one: bfloat16 from Hopper on, all types on the CPU. Else a
    matmul an expert, which waits for the GPU to know the rows of each.
    """
    if has_kernel(rows):
        return F.grouped_mm(rows, matrices, offs=ends)
    parts = [rows[start:stop] @ matrices[e] for e, start, stop in spans(ends)]
    num_rows = sum(map(len, parts))
    return torch.cat([*parts, rows.new_zeros(len(rows) - num_rows, matrices.shape[2])])


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Compute left[rows of e]^T right[rows of e]: (P, out), (P, in) -> (E, out, in)."""
    if has_kernel(left):
        return F.grouped_mm(left.t(), right, offs=ends)
    return torch.stack([left[start:stop].t() @ right[start:stop] for _, start, stop in spans(ends)])


def has_kernel(rows: Tensor) -> bool:
    return not rows.is_cuda or (
        rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    )


def spans(ends: Tensor) -> list[tuple[int, int, int]]:
    """List (expert, first row, row after its last)."""
    stops = ends.tolist()
    return list(zip(range(len(stops)), [0, *stops[:-1]], stops, strict=True))


@fused
def sum_rows(rows: Tensor, slots: Tensor, has_weights: Tensor) -> Tensor:
    """Add up each token's rows: (P, H) by (T, K) -> (T, H), in a fixed order, no atomics."""
    picks = zip(slots.unbind(1), has_weights.unbind(1), strict=True)
    # One by one: compiled, it is then no reduction, and six times as fast.
    return sum(rows[slot].where(is_there[:, None], 0) for slot, is_there in picks)  # pyright: ignore


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows if weight.requires_grad else None, weight, ends)
        return grouped_matmul(rows, weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        grad_rows = grouped_matmul(grad, weight, ends) if needs_rows else None
        grad_weight = grouped_outer(grad, rows, ends) if needs_weight else None
        return grad_rows, grad_weight, None


class _Spread(torch.autograd.Function):
    """Copies a row for every pick: (T, H) -> (P, H). Its adjoint `_Sum` needs no atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor, has_weights: Tensor) -> Tensor:
        ctx.save_for_backward(slots, has_weights)
        return x[tokens]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_rows(grads[0], *ctx.saved_tensors), None, None, None


class _Sum(torch.autograd.Function):
    """Applies `sum_rows`; its adjoint is `_Spread`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, tokens: Tensor, slots: Tensor, has_weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        return sum_rows(rows, slots, has_weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (tokens,) = ctx.saved_tensors
        return grads[0][tokens], None, None, None
