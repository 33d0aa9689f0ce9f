"""Plans an item that shows and sounds: timestamps, image pads, audio tags and audio pads.

Place in the data flow: media/frame_sampling.py gives the timestamps, media/pixels.py the tokens of
each unit, media/fbank.py the audio tokens; template.py turns the plan into ids. Rules of
data/converters/multimodal_interleaved_converter.py (meituan-longcat/LongCat-Flash-Omni).

A unit is one pair of frames. `sequential`: units and sound side by side in chunks of a second, as
they would be streamed. `average`: equal sound after every unit, for units that are not a second
apart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.media.frame_sampling import Strategy

AUDIO_TOKEN_SECONDS = 0.08


class Part(NamedTuple):
    """Stands for a run of equal tokens, or for a timestamp."""

    kind: Literal["timestamp", "image_tokens", "audio_begin", "audio_pads", "audio_end"]
    text: str = ""  # of a timestamp
    count: int = 1  # of tokens


def plan_interleaved(
    timestamps: Sequence[str],
    image_tokens: Sequence[int],
    num_audio_tokens: int,
    *,
    strategy: Strategy = "sequential",
    units_per_second: int = 1,
    chunk_seconds: float = 1,
) -> tuple[Part, ...]:
    """Return units with their timestamps, the sound between them; no audio tag without sound.

    With `average`, the official code leaves out the closing tag when there is one unit, and writes
    tags around no sound: not followed, as everything after an open tag would count as sound.

    Args:
        timestamps: one a unit; "" writes none.
        image_tokens: of each unit.
        num_audio_tokens: of the whole clip; every one of them is placed.
        chunk_seconds: `sequential` only: how much of the video goes before its sound.

    Raises:
        ValueError: no units, unequal lengths, or units that do not make whole chunks.
    """
    num_units = len(timestamps)
    if num_units == 0 or num_units != len(image_tokens):
        raise ValueError(
            f"{num_units} timestamps and {len(image_tokens)} image token counts: an interleaved "
            "item needs one of each for every pair of frames, and at least one pair"
        )
    pads: list[int | None]  # after each unit; None: no place for sound
    if num_audio_tokens == 0:
        pads = [None] * num_units
    elif strategy == "average":
        share, rest = divmod(num_audio_tokens, num_units)
        pads = [*[share] * (num_units - 1), share + rest]
    else:
        pads = _sequential_pads(num_units, num_audio_tokens, units_per_second, chunk_seconds)
    has_sound = [unit for unit, count in enumerate(pads) if count is not None]
    parts = []
    for unit, (timestamp, count) in enumerate(zip(timestamps, image_tokens, strict=True)):
        parts += [Part("timestamp", text=timestamp), Part("image_tokens", count=count)]
        num_pads = pads[unit]
        if num_pads is None:
            continue
        if unit == has_sound[0]:
            parts.append(Part("audio_begin"))
        parts.append(Part("audio_pads", count=num_pads))
        if unit == has_sound[-1]:
            parts.append(Part("audio_end"))
    return tuple(part for part in parts if part.count and (part.text or part.kind != "timestamp"))


def _sequential_pads(
    num_units: int, num_audio_tokens: int, units_per_second: int, chunk_seconds: float
) -> list[int | None]:
    """Return the audio pads after each unit, None where no sound belongs: in a chunk or before it.

    A video longer than its sound begins alone; sound longer than its video ends in the last chunk.
    """
    video_chunks = math.ceil(num_units / units_per_second / chunk_seconds)
    audio_chunks = math.ceil(num_audio_tokens * AUDIO_TOKEN_SECONDS / chunk_seconds)
    units_per_chunk = int(units_per_second * chunk_seconds)
    if video_chunks * units_per_chunk != num_units:
        raise ValueError(  # as official
            f"{num_units} pairs of frames, {units_per_second} a second, do not make chunks of "
            f"{chunk_seconds:g} s: set chunk_seconds to 1"
        )
    # 12.5 tokens a second: 12, and one more in every second chunk.
    tokens, every = (chunk_seconds / AUDIO_TOKEN_SECONDS).as_integer_ratio()
    pads: list[int | None] = [None] * num_units
    num_chunks = min(video_chunks, audio_chunks)
    left = num_audio_tokens
    for chunk in range(num_chunks):
        count = tokens // every + (every > 1 and (chunk + 1) % every == 0)
        if chunk == num_chunks - 1:
            count = left
        left -= count
        unit = (video_chunks - num_chunks + chunk + 1) * units_per_chunk - 1
        pads[unit] = count
    return pads
