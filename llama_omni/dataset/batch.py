"""Holds samples padded to one batch, and the two ids that are no token.

Place in the data flow: samples -> batches (data_utils.py) -> model (model/omni.py). It imports no
torch, so that dataset/prompt.py and with it the plan start at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

IGNORE_INDEX = -100
SPEECH_TOKEN_INDEX = -200


@dataclass
class Batch:
    """Samples padded on the right; the clips of all turns of all samples stand in order."""

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, IGNORE_INDEX where nothing is learned
    speech: torch.Tensor  # (S, n_mels, F) float32
    speech_lengths: torch.Tensor  # (S,) int64, mel frames
    tgt_units: torch.Tensor | None  # (B, U) int64, IGNORE_INDEX as padding

    @property
    def num_label_tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_units(self) -> int:
        return 0 if self.tgt_units is None else int((self.tgt_units != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:  # called by the DataLoader
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            change(self.input_ids),
            change(self.labels),
            change(self.speech),
            change(self.speech_lengths),
            None if self.tgt_units is None else change(self.tgt_units),
        )
