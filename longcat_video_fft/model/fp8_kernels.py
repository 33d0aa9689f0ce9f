"""Rounding to float8 along rows and along columns at once, for `fp8.py`; Triton.

A backward pass needs a gradient by rows (for the input's gradient) and, transposed, by columns (for
the weight's). Compiled from PyTorch that reads the gradient four times and writes the transposed
copy across the grain of memory; here it is two passes over tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_video_fft.model.float8 import FLOAT8, FLOAT8_MAX

TILE = 128


@triton.jit
def _find_peaks(x, row_peaks, column_peaks, m, k, by_rows: tl.constexpr, tile: tl.constexpr):
    """Finds the largest absolute value of each row and column, as float32; those begin at 0."""
    rows = tl.program_id(0) * tile + tl.arange(0, tile)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    is_inside = (rows[:, None] < m) & (columns[None, :] < k)
    place = rows[:, None].to(tl.int64) * k + columns[None, :]
    values = tl.abs(tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32))
    if by_rows:
        tl.atomic_max(row_peaks + rows, tl.max(values, 1), mask=rows < m)
    tl.atomic_max(column_peaks + columns, tl.max(values, 0), mask=columns < k)


@triton.jit
def _round(
    x, row_peaks, column_peaks, by_row, by_column, m, k, by_rows: tl.constexpr, tile: tl.constexpr
):
    """Rounds (M, K) -> float8 (M, K) scaled by rows and float8 (K, M) scaled by columns."""
    rows = tl.program_id(0) * tile + tl.arange(0, tile)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    is_inside = (rows[:, None] < m) & (columns[None, :] < k)
    place = rows[:, None].to(tl.int64) * k + columns[None, :]
    values = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32)
    if by_rows:
        peaks = tl.load(row_peaks + rows, mask=rows < m, other=1.0)
        scaled = values * (448.0 / tl.maximum(peaks, 448e-12))[:, None]
        tl.store(by_row + place, scaled.to(tl.float8e4nv), mask=is_inside)
    peaks = tl.load(column_peaks + columns, mask=columns < k, other=1.0)
    scaled = values * (448.0 / tl.maximum(peaks, 448e-12))[None, :]
    turned = tl.trans(scaled.to(tl.float8e4nv))  # (columns, rows)
    place = columns[:, None].to(tl.int64) * m + rows[None, :]
    tl.store(by_column + place, turned, mask=(columns[:, None] < k) & (rows[None, :] < m))


def _run(x: Tensor, *, by_rows: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, k = x.shape
    x = x.contiguous()
    peaks = torch.zeros(m + k, dtype=torch.float32, device=x.device)
    row_peaks, column_peaks = peaks[:m], peaks[m:]
    row = torch.empty(x.shape if by_rows else (0,), dtype=FLOAT8, device=x.device)
    column = torch.empty((k, m), dtype=FLOAT8, device=x.device)
    grid = (triton.cdiv(m, TILE), triton.cdiv(k, TILE))
    _find_peaks[grid](x, row_peaks, column_peaks, m, k, by_rows, TILE)  # pyright: ignore
    _round[grid](x, row_peaks, column_peaks, row, column, m, k, by_rows, TILE)  # pyright: ignore
    scales = peaks.clamp(min=FLOAT8_MAX * 1e-12) / FLOAT8_MAX
    return row, scales[:m, None].clone(), column, scales[m:, None].clone()


@torch.library.custom_op("longcat_video_fft::round_both", mutates_args=())
def round_both(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounds (M, K) to float8 (M, K), its rows' scales (M, 1); (K, M), its rows' scales (K, 1)."""
    return _run(x, by_rows=True)


@round_both.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, k = x.shape
    row_scales = x.new_empty((m, 1), dtype=torch.float32)
    column_scales = x.new_empty((k, 1), dtype=torch.float32)
    rows, columns = x.new_empty((m, k), dtype=FLOAT8), x.new_empty((k, m), dtype=FLOAT8)
    return rows, row_scales, columns, column_scales


@torch.library.custom_op("longcat_video_fft::round_columns", mutates_args=())
def round_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds (M, K) -> float8 (K, M) and its rows' scales (K, 1)."""
    return _run(x, by_rows=False)[2:]


@round_columns.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    return x.new_empty((k, m), dtype=FLOAT8), x.new_empty((k, 1), dtype=torch.float32)
