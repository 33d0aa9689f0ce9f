"""The choice of attention's kernel; FlashAttention-4 where there is a GPU and the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longcat_video_fft.model.attention import attend
from longcat_video_fft.model.attention_kernels import (
    attend_flash4,
    choose_kernel,
    chosen_backend,
    flash4,
    resolve,
)
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.launch import is_installed

needs_flash4 = pytest.mark.skipif(
    not torch.cuda.is_available() or not is_installed("flash-attn-4"),
    reason="needs a GPU and flash-attn-4",
)


def test_a_cpu_leaves_it_to_torch() -> None:
    cpu = torch.device("cpu")
    assert resolve("diffusers", 128, cpu) == "diffusers"
    assert resolve("math", 128, cpu) == "math"
    assert chosen_backend("diffusers", 64, torch.bfloat16, cpu) == "flash"
    assert chosen_backend("math", 64, torch.bfloat16, cpu) == "math"


def test_a_models_kernel_is_its_own() -> None:
    """Two models run side by side; float32 and masks are left to torch's own kernels."""
    calls: list[torch.dtype] = []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(q.dtype)
        return attend(q, k, v)

    assert choose_kernel("flash4") is attend_flash4
    assert choose_kernel("math") is None
    config: dict[str, Any] = {"hidden_size": 64, "depth": 2, "num_heads": 1, "caption_channels": 32}
    models: list[Any] = [
        LongCatVideoTransformer3DModel(**config, adaln_tembed_dim=32) for _ in range(2)
    ]
    models[0].set_attention_kernel(kernel)
    latents, caption, mask = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 8, 32), torch.ones(1, 8)
    for dtype, number in ((torch.float32, 0), (torch.bfloat16, 2)):
        for model in models:
            calls.clear()
            inputs = (latents.to(dtype), torch.full((1, 2), 500.0), caption.to(dtype))
            model.to(dtype)(*inputs, mask)
            assert calls == [dtype] * (number if model is models[0] else 0)


@pytest.mark.gpu
@needs_flash4
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (700, 96)])
def test_flash4_against_float32(queries: int, keys: int, compiled: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, queries, 4, 128), (2, keys, 4, 128), (2, keys, 4, 128)]
    q, k, v = (torch.randn(shape, device="cuda").transpose(1, 2) for shape in shapes)
    grad = torch.randn_like(q)
    expected = both_ways(attend, q, k, v, grad)
    function = torch.compile(attend_flash4, fullgraph=True) if compiled else attend_flash4
    found = both_ways(function, *(x.bfloat16() for x in (q, k, v, grad)))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()
    assert resolve("diffusers", 128, torch.device("cuda")) == "flash4"
    torch.library.opcheck(flash4, (q.bfloat16(), k.bfloat16(), v.bfloat16()))


def both_ways(function, q, k, v, grad) -> list[torch.Tensor]:  # pyright: ignore
    """Computes the result and the three gradients."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]
