"""Describes turn by turn what a sample says and shows; train_ds.py's `preprocess_function` does so.

template.py makes streams of it. Imports nothing that takes long, as train_ds.py begins with it.

N codec frames of a segment, S audio streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from vss_longcat_omni.dataset.interleave import Part


@dataclass(frozen=True)
class TextItem:
    text: str


@dataclass(frozen=True)
class MediaItem:
    """Holds sound, pictures or both, as interleave.py plans them."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Segment:
    """Holds speech up to a pause.

    `text` None: no transcript is known and the text stream is all pads (text-pad-only). The model
    then learns to speak without a text to follow, so the caller has to choose it.
    """

    text: str | None
    codes: Tensor  # (N, S) int64 raw codes


@dataclass(frozen=True)
class VoiceItem:
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Turn:
    role: Literal["system", "user", "assistant", "voice assistant"]
    items: tuple[TextItem | MediaItem | VoiceItem, ...]
