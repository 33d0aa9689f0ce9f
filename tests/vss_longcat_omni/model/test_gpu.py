"""What runs on a GPU alone against the same in plain PyTorch: `pytest -m gpu`, from Hopper on."""

from __future__ import annotations

from importlib.metadata import distributions

import pytest
import torch
from torch.nn import functional as F

from vss_longcat_omni.model import attention, experts, language_model
from vss_longcat_omni.model.attention_kernels import can_use_flash4
from vss_longcat_omni.model.experts import grouped_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("sizes", [[128, 64, 256], [7, 0, 1, 33, 0, 90], [0, 0, 5]])
def test_grouped_matmul_and_its_gradients(sizes: list[int]) -> None:
    """Groups of odd sizes and empty ones; rows after the last group count for nothing."""
    torch.manual_seed(0)
    ends = torch.tensor(sizes, device="cuda").cumsum(0).int()
    total = sum(sizes)
    rows = torch.randn(total + 9, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(len(sizes), 96, 64, device="cuda", dtype=torch.bfloat16)
    weight.requires_grad_()
    mask = torch.zeros(total + 9, 96, device="cuda", dtype=torch.bfloat16)
    mask[:total].normal_()
    out = grouped_linear(rows, weight, ends)
    (out[:total] * mask[:total]).sum().backward()
    wide = rows.detach().float().requires_grad_()
    weight_wide = weight.detach().float().requires_grad_()
    pieces = wide[:total].split(sizes)
    plain = torch.cat([x @ w.t() for x, w in zip(pieces, weight_wide, strict=True)])
    (plain * mask[:total].float()).sum().backward()
    assert relative_error(out[:total], plain) < 1e-2
    for found, wanted in ((rows, wide), (weight, weight_wide)):
        assert found.grad is not None
        assert wanted.grad is not None
        assert torch.isfinite(found.grad[:total]).all()
        assert relative_error(found.grad[:total], wanted.grad[:total]) < 1e-2


@pytest.mark.skipif(not any(distributions(name="flash-attn-4")), reason="needs flash-attn-4")
def test_flash_attention_4_on_a_pack() -> None:
    torch.manual_seed(0)
    lengths = [300, 1, 77, 130]
    q, k = (torch.randn(sum(lengths), 4, 192, device="cuda", dtype=torch.bfloat16) for _ in "qk")
    v = torch.randn(sum(lengths), 4, 128, device="cuda", dtype=torch.bfloat16)
    assert can_use_flash4(q, v)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wides = [x.detach().float().requires_grad_() for x in inputs]
    found = attention.attend(*inputs, lengths, scale=0.07)  # pyright: ignore[reportCallIssue]
    wanted = attention.attend(*wides, lengths, scale=0.07)  # pyright: ignore[reportCallIssue]
    grad = torch.randn_like(wanted)
    found.backward(grad.bfloat16())
    wanted.backward(grad)
    assert relative_error(found, wanted) < 1e-2
    for x, wide in zip(inputs, wides, strict=True):
        assert x.grad is not None
        assert wide.grad is not None
        assert relative_error(x.grad, wide.grad) < 2e-2


def test_fused_chains_are_the_plain_ones() -> None:
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").requires_grad_()

    angles = torch.randn(37, 1, 4, device="cuda")
    slots = torch.randint(0, 90, (37, 3), device="cuda")
    has_weights = torch.rand(37, 3, device="cuda") > 0.3
    cases = {
        attention.rotate_queries: (draw(37, 4, 24), angles.cos(), angles.sin(), 16, 1.5),
        attention.expand_keys: (draw(37, 4, 20), draw(37, 8), 12),
        experts.gate: (draw(37, 20), draw(37)),
        experts.sum_rows: (draw(90, 12), slots, has_weights),
        language_model.silu_times: (draw(37, 20), draw(37, 20)),
    }
    for function, inputs in cases.items():
        leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        results = []
        for work in (function, function.__wrapped__):
            out = work(*inputs)
            total = torch.cat([x.flatten() for x in (out if isinstance(out, tuple) else (out,))])
            grads = torch.autograd.grad(F.silu(total).sum(), leaves)
            results.append([total, *grads])
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
