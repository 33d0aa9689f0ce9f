"""Computes the losses: cross-entropy of answers' tokens (stage 1), CTC of their units (stage 2).

Sums over a micro-batch; training/loop.py divides them by the global count.

Shapes: A answer tokens, B answers, N frames, V vocabulary or units, U target units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_omni.dataset.batch import IGNORE_INDEX


@dataclass
class LossSums:
    """Holds sums over one micro-batch, before division by the global count."""

    loss: Tensor  # () differentiable, nats
    num_correct: Tensor  # () tokens right (stage 1) or frames of blank (stage 2)
    num_predicted: Tensor  # () tokens (stage 1) or frames (stage 2)


def sum_text_loss(logits: Tensor, targets: Tensor) -> LossSums:
    """Sums the cross-entropy of (A, V) float32 logits against (A,) tokens."""
    loss = F.cross_entropy(logits, targets, reduction="sum")
    num_correct = (logits.argmax(-1) == targets).sum()
    return LossSums(loss, num_correct, torch.tensor(len(targets), device=targets.device))


def sum_unit_loss(
    logits: Tensor, num_frames: Tensor, tgt_units: Tensor, unit_lengths: Tensor, *, blank: int
) -> LossSums:
    """Sums CTC of (B, N, V + 1) logits of (B,) frames against (B, U) units, (B,) their numbers."""
    loss = ctc_sum(logits, num_frames, tgt_units, unit_lengths, blank=blank)
    is_frame = torch.arange(logits.shape[1], device=logits.device) < num_frames[:, None]
    num_blank = ((logits.argmax(-1) == blank) & is_frame).sum()
    return LossSums(loss, num_blank, num_frames.sum())


def ctc_sum(
    logits: Tensor, num_frames: Tensor, tgt_units: Tensor, unit_lengths: Tensor, *, blank: int
) -> Tensor:
    """Sums the CTC losses in float32; impossible targets add 0 and no gradient.

    cuDNN's CTC is switched off: it assumes that blank is 0 and did not zero impossible targets.
    """
    log_probs = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)  # (N, B, V + 1)
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(
            log_probs,
            tgt_units[tgt_units != IGNORE_INDEX],
            num_frames,
            unit_lengths,
            blank=blank,
            reduction="sum",
            zero_infinity=True,
        )


def count_infeasible(
    labels: Tensor, tgt_units: Tensor, *, factor: int, stretch: bool = True
) -> tuple[int, int]:
    """Counts answers with (more units than frames, no CTC path, even when stretched if they are).

    A path needs one frame a unit and one blank between equal neighbors.
    """
    is_unit = tgt_units != IGNORE_INDEX
    repeats = ((tgt_units[:, 1:] == tgt_units[:, :-1]) & is_unit[:, 1:]).sum(1)
    units = is_unit.sum(1)
    frames = (labels != IGNORE_INDEX).sum(1) * factor
    too_few = units + repeats > frames
    impossible = units + repeats > (torch.maximum(frames, units) if stretch else frames)
    return int(too_few.sum()), int(impossible.sum())
