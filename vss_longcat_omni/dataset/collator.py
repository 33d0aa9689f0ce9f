"""Joins examples to one micro-batch: all one after the other, without padding.

Each sample sees itself alone (model/attention.py), and no position predicts into the next sample.

Shapes: T positions of all samples, S audio streams, N and M positions with targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vss_longcat_omni.dataset.special_tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.dataset.examples import Example


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Return the arguments of `LongcatOmniForCausalLM.forward`, but `num_targets`."""
    text_positions, text_targets = find_targets([e.text_labels[:, None] for e in examples])
    audio_positions, audio_targets = find_targets([e.audio_labels for e in examples])
    return {
        "input_ids": torch.cat([e.input_ids for e in examples]),  # (T,)
        "audio_ids": torch.cat([e.audio_ids for e in examples]),  # (T, S)
        "lengths": [len(e.input_ids) for e in examples],
        "text_positions": text_positions,  # (N,)
        "text_targets": text_targets[:, 0],
        "audio_positions": audio_positions,  # (M,)
        "audio_targets": audio_targets,  # (M, S)
        "pictures": collate_pictures(examples),
        "sound": collate_sound(examples),
    }


def find_targets(labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the positions (M,) in the pack that predict anything, and the labels (M, S) of their
    next one; `labels` has (T_i, S) of each sample, at the positions that they describe."""
    positions, targets, start = [], [], 0
    for own in labels:
        following = own[1:]  # the last position of a sample predicts nothing
        places = (following != IGNORE_INDEX).any(dim=1).nonzero()[:, 0]
        positions.append(places + start)
        targets.append(following[places])
        start += len(own)
    return torch.cat(positions), torch.cat(targets)


def count_targets(batch: dict[str, Any]) -> Tensor:
    """Return (3,) float32: the targets of text, of all audio streams, of the semantic one."""
    audio = batch["audio_targets"] != IGNORE_INDEX
    text = batch["text_targets"] != IGNORE_INDEX
    return torch.stack([text.sum(), audio.sum(), audio[:, 0].sum()]).float()


def collate_pictures(examples: Sequence[Example]) -> dict[str, Any] | None:
    shown = [e for e in examples if len(e.pixel_values)]
    if not shown:
        return None
    return {
        "pixel_values": torch.cat([e.pixel_values for e in shown]),
        "grids": [grid for e in shown for grid in e.grids],
        "pooled_grids": [grid for e in shown for grid in e.pooled_grids],
    }


def collate_sound(examples: Sequence[Example]) -> dict[str, Any] | None:
    """Pad the clips to the longest; the encoder leaves the padding out."""
    sounding = [e.features for e in examples if len(e.features)]
    if not sounding:
        return None
    lengths = [len(features) for features in sounding]
    return {
        "features": pad_sequence(sounding, batch_first=True),
        "lengths": torch.tensor(lengths),
        "num_tokens": sum(lengths),
    }
