"""Turns a micro-batch's sums of the loss into loss and accuracy of each term.

Place in the data flow: model/omni.py gives the sums, trainer.py adds them up over steps and
processes and logs what comes out; inference/measure.py does so for a split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from vss_longcat_omni.model.omni import OmniOutput

TERMS = ("text", "audio", "semantic")


def stack_sums(outputs: OmniOutput) -> Tensor:
    """Stack losses, counts and right ones of a micro-batch, (3, terms) float64 on the CPU."""
    sums: Any = [outputs.losses, outputs.counts, outputs.num_correct]
    return torch.stack(sums).double().cpu()


def describe(sums: Tensor) -> dict[str, float]:
    """Compute loss (nats a target) and accuracy of each term with targets, from (3, terms) sums."""
    found = {}
    for term, (loss, count, num_correct) in zip(TERMS, sums.T.tolist(), strict=True):
        if count:
            found[f"{term}_loss"] = loss / count
            found[f"{term}_accuracy"] = num_correct / count
    return found
