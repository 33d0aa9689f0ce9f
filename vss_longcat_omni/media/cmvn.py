"""Keeps global statistics that normalize the filter bank's frames, and reads their Kaldi file.

fbank.py uses them. The released model has them as audio/global_cmvn, which the official code reads
with kaldiio (data/audio_feature.py of meituan-longcat/LongCat-Flash-Omni).

D values a frame.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

CMVN_NAME = "global_cmvn"
FLOAT32_EPS = torch.finfo(torch.float32).eps
KALDI_HEADER = struct.Struct("<2s3sbibi")  # "\0B", type, 4, rows, 4, columns
KALDI_TYPES = {b"FM ": "<f4", b"DM ": "<f8"}


@dataclass(frozen=True, eq=False)
class Cmvn:
    """Holds the global mean and scale of each value of a frame, (D,) float32 each."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def from_stats(cls, stats: Tensor, *, source: str = CMVN_NAME) -> Cmvn:
        """Make it from (2, D+1): sums and the number of frames; sums of squares, a value not used.

        Computes in the type of `stats`, as officially: the model learned with the rounding of its
        own file. Raises ValueError naming `source`.
        """
        if stats.ndim != 2 or len(stats) != 2 or stats.shape[1] < 2:
            raise ValueError(
                f"{source}: a {tuple(stats.shape)} matrix instead of two rows: sums with the "
                "number of frames, and sums of squares"
            )
        count = stats[0, -1]
        mean = stats[0, :-1] / count
        variance = stats[1, :-1] / count - mean.square()
        if not (count > 0 and variance.isfinite().all() and variance.min() >= 0):
            worst = variance.nan_to_num(nan=-torch.inf).argmin()
            raise ValueError(
                f"{source}: value {worst} of a frame has the variance {variance[worst]:g} over "
                f"{count:g} frames: compute the statistics again, from sound that is not all silent"
            )
        scale = 1 / variance.float().sqrt().clamp(min=FLOAT32_EPS)
        return cls(mean.float(), scale)


def read_kaldi_matrix(path: Path) -> Tensor:
    """Read (rows, columns) from a Kaldi matrix file, binary (float or double) or text.

    Text becomes float32, as kaldiio reads it. Raises FileNotFoundError, or ValueError naming the
    file.
    """
    content = path.read_bytes()
    try:
        if content.startswith(b"\0B"):
            return torch.from_numpy(_parse_binary(content))
        body = content.decode("ascii").strip()
        if not (body.startswith("[") and body.endswith("]")):
            raise ValueError("neither binary nor text within [ ]")
        return torch.from_numpy(np.loadtxt(io.StringIO(body[1:-1]), dtype=np.float32, ndmin=2))
    except ValueError as error:
        raise ValueError(
            f"{path}: not readable as a Kaldi matrix ({error}): copy it again from the model"
        ) from error


def write_kaldi_matrix(path: Path, matrix: Tensor) -> None:
    """Write a binary matrix of doubles."""
    header = KALDI_HEADER.pack(b"\0B", b"DM ", 4, matrix.shape[0], 4, matrix.shape[1])
    path.write_bytes(header + matrix.cpu().double().numpy().astype("<f8").tobytes())


def _parse_binary(content: bytes) -> np.ndarray:
    if len(content) < KALDI_HEADER.size:
        raise ValueError("the header is cut off")
    _, kind, _, num_rows, _, num_columns = KALDI_HEADER.unpack_from(content)
    if kind not in KALDI_TYPES:
        raise ValueError(f"of type {kind.decode('latin-1').strip()!r}; FM and DM can be read")
    dtype = np.dtype(KALDI_TYPES[kind])
    size = len(content) - KALDI_HEADER.size
    if size != num_rows * num_columns * dtype.itemsize:
        raise ValueError(f"{num_rows} x {num_columns} numbers announced, {size} bytes of them")
    values = np.frombuffer(content, dtype, offset=KALDI_HEADER.size)
    return values.reshape(num_rows, num_columns).astype(dtype.newbyteorder("="))  # a writable copy
