"""Float8 matmuls against exact ones."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from longcat_video_fft.model.fp8 import LINEARS, float8_matmul, round_rows, use_fp8_linears
from longcat_video_fft.model.layers import Linear
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from tests.longcat_video_fft.support.tiny import ROOT

NEW_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not NEW_TORCH, reason="row scales on the CPU")),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_matmuls_and_gradients_are_close(device: str) -> None:
    """float8 keeps 3 bits of the mantissa: about 2.6 % of error an entry, 3.7 % a matmul."""
    torch.manual_seed(0)
    x = torch.randn(3, 32, 96, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer: Any = Linear(96, 128, device=device, dtype=torch.bfloat16)
    results = []
    for matmul in (F.linear, float8_matmul):
        layer.matmul = matmul
        x.grad = layer.weight.grad = None
        out = layer(x)
        out.square().mean().backward()
        results.append((out, x.grad, layer.weight.grad, layer.bias.grad))
        layer.bias.grad = None
    for exact, rounded in zip(*results, strict=True):
        error = (exact - rounded).norm() / exact.norm()
        assert 0 < error < 0.08


def test_each_row_has_its_own_scale() -> None:
    x = torch.tensor([[1.0, 448.0], [0.001, 0.002], [0.0, 0.0]])
    rounded, scale = round_rows(x)
    torch.testing.assert_close(rounded.float() * scale, x, rtol=0.07, atol=0)
    assert rounded[1, 1].item() == 448.0


def test_names_and_all_large_matmuls_change() -> None:
    config: dict[str, Any] = {"hidden_size": 64, "depth": 1, "num_heads": 2, "caption_channels": 32}
    model = LongCatVideoTransformer3DModel(**config, adaln_tembed_dim=32)
    names = set(model.state_dict())
    use_fp8_linears(model)
    assert set(model.state_dict()) == names
    matmuls = {n: getattr(m, "matmul", None) for n, m in model.blocks[0].named_modules()}
    assert {n for n, matmul in matmuls.items() if matmul is float8_matmul} == set(LINEARS)


def test_odd_widths_are_errors() -> None:
    config: dict[str, Any] = {"hidden_size": 40, "depth": 1, "num_heads": 1, "caption_channels": 32}
    with pytest.raises(ValueError, match="multiples of 16"):
        use_fp8_linears(LongCatVideoTransformer3DModel(**config, adaln_tembed_dim=32))


KERNELS = """
import torch
from longcat_video_fft.model.fp8 import round_rows
from longcat_video_fft.model.fp8_kernels import round_both, round_columns
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
x = (torch.randn(200, 336) * torch.rand(200, 1)).bfloat16().to(device)
row, row_scale, column, column_scale = round_both(x)
for (value, scale), wanted in (((row, row_scale), x), ((column, column_scale), x.t())):
    torch.testing.assert_close(scale, round_rows(wanted)[1])
    assert ((value.float() * scale - wanted.float()).norm() / wanted.float().norm()) < LIMIT
    assert value.shape == wanted.shape and value.is_contiguous()
again, again_scale = round_columns(x)
assert torch.equal(again.view(torch.uint8), column.view(torch.uint8))
assert torch.equal(again_scale, column_scale)
"""


def test_kernels() -> None:
    """They run on the GPU, else in Triton's interpreter, which cuts where the GPU rounds."""
    pytest.importorskip("triton")
    has_gpu = torch.cuda.is_available()
    code = KERNELS.replace("LIMIT", "0.03" if has_gpu else "0.07")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not has_gpu:
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
