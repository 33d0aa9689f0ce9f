"""One process's part of a sharded parameter, and random bits that depend on the place in the whole.

What is drawn or rounded by them (`training/optimizer.py`) is alike on any number of processes.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(value: Any) -> Tensor:
    """This process's own part of a sharded tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def first_element(param: Tensor) -> int:
    """Where this process's part begins in the whole parameter, in elements."""
    if not isinstance(param, DTensor):
        return 0
    if not all(isinstance(p, Replicate) or p == Shard(0) for p in param.placements):
        raise ValueError(f"parameters must be sharded by rows, not as {param.placements}.")
    _, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return offset[0] * math.prod(param.shape[1:]) if offset else 0


def random_keys(*parts: object) -> tuple[int, int]:
    """Two int32 that any part changes."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "big", signed=True),
        int.from_bytes(digest[4:], "big", signed=True),
    )


def random_bits(keys: Tensor, like: Tensor) -> Tensor:
    """32 random bits an element, the same on every kind of device: a hash of its place.

    Args:
        keys: (4,) int32: two of `random_keys`, the place of the first element, which may wrap
            around, and the elements a row where `like` has rows.
    """
    place = torch.arange(like.shape[-1], dtype=torch.int32, device=like.device)
    if like.ndim > 1:  # by the width in `keys`: by that of the shape, Inductor would take int64
        rows = torch.arange(len(like), dtype=torch.int32, device=like.device)
        place = rows[:, None] * keys[3] + place
    return mix(place + (keys[0] + keys[2]), keys[1])


def mix(x: Tensor, key: Tensor) -> Tensor:
    """A 32-bit mixing function (lowbias32, github.com/skeeto/hash-prospector) on int32, with a key
    between its rounds."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D + key
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)


def to_int32(number: int) -> int:
    """The low 32 bits as a signed number."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
