"""Computes the loss: text and four streams of codes, each term over its own count of targets.

A term's sum is divided by the number of its targets in the whole step: all micro-batches, all
processes. So a step does not depend on how its samples were divided.

Shapes: N positions, V rows of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from vss_longcat_omni.dataset.special_tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.options.run_arguments import LossWeights


@dataclass
class LossSums:
    """Holds sums over one micro-batch; the order is text, audio, semantic."""

    losses: Tensor  # (3,) nats, differentiable
    counts: Tensor  # (3,) targets
    num_correct: Tensor  # (3,) targets whose id had the highest score


def compute_loss_sums(
    text_logits: Tensor, text_targets: Tensor, audio_logits: Sequence[Tensor], audio_targets: Tensor
) -> LossSums:
    """Sum cross-entropies in float32.

    Args:
        text_logits, text_targets: (N, V), (N,); IGNORE_INDEX counts as nothing.
        audio_logits, audio_targets: for each head (M, V); (M, heads), likewise.
    """
    text = _sums(text_logits, text_targets)
    heads = torch.stack(
        [_sums(logits, audio_targets[:, head]) for head, logits in enumerate(audio_logits)]
    )
    losses, counts, num_correct = torch.stack([text, heads.sum(dim=0), heads[0]], dim=1)
    return LossSums(losses, counts.detach(), num_correct.detach())


def combine(sums: LossSums, counts: Tensor, weights: LossWeights) -> Tensor:
    """Return the weighted loss (), each term divided by its count of (3,); 0 for a term of none."""
    divisors = counts.where(counts > 0, 1)
    return (_as_tensor(weights, counts.device) * sums.losses / divisors).sum()


def _as_tensor(weights: LossWeights, device: torch.device) -> Tensor:
    return torch.tensor([weights.text, weights.audio, weights.semantic], device=device)


def _sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (3,): the loss, the number of targets, and how many of them were right."""
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    is_target = targets != IGNORE_INDEX
    num_correct = ((logits.argmax(dim=-1) == targets) & is_target).sum()
    return torch.stack([loss, is_target.sum().to(loss.dtype), num_correct.to(loss.dtype)])
