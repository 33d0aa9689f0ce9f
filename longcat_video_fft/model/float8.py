"""The float8 format of `fp8.py` and of its kernels."""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
