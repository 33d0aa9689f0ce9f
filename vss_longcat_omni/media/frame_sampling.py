"""Chooses by a video's length which of its frames are taken, and each pair's timestamp.

Place in the data flow: video.py decodes the frames chosen here; dataset/interleave.py writes the
timestamps into the prompt. The vision encoder joins two frames to one temporal unit, so frames come
in pairs and a unit has one timestamp, that of its first frame.

Rules (data/utils.py of meituan-longcat/LongCat-Flash-Omni, of which every rounding is kept):
`multimodal_interleaved` for a video with sound beside it, `video` for a video alone. `plain_2fps`
is what the technical report describes and the official code does not do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal, get_args

import numpy as np
import torch

from vss_longcat_omni.options.run_arguments import SamplingRule

Strategy = Literal["sequential", "average"]

MIN_FRAMES, MAX_RATE = 16, 4  # of rule `video`: a short clip gets up to 4 fps to reach 16 frames
SLOW_SECONDS = 8  # of rule `video`: 0.5 fps up to here, before MIN_FRAMES is applied


@dataclass(frozen=True, kw_only=True)
class FrameSample:
    """Holds an even number of frame indices, which may repeat; a timestamp for every two."""

    frame_indices: tuple[int, ...]
    timestamps: tuple[str, ...]  # "second{1.2}:"
    strategy: Strategy  # how dataset/interleave.py deals out the sound between the units
    duration: float  # seconds as the rule counts them: rounded up; of `video`: the last timestamp


def sample_frames(
    num_frames: int, fps: float, *, rule: SamplingRule = "multimodal_interleaved"
) -> FrameSample:
    """Sample a whole video of `num_frames` at `fps` by one of the rules.

    Raises:
        ValueError: there is no such rule, or the rule has no frames for such a video.
    """
    if rule == "multimodal_interleaved":
        return sample_interleaved(num_frames, fps)
    if rule == "video":
        return sample_video(num_frames, fps)
    if rule == "plain_2fps":
        return sample_plain(num_frames, fps)
    raise ValueError(
        f"frame sampling rule {rule!r}: choose one of {', '.join(get_args(SamplingRule))}"
    )


def sample_interleaved(
    num_frames: int,
    fps: float,
    *,
    bound: tuple[float, float] | None = None,
    time_offset: float = 0.0,
    units_per_second: int = 1,
    max_units: int = -1,
    strategy: Strategy = "sequential",
) -> FrameSample:
    """Sample by `multimodal_interleaved`: 2 * ceil(seconds) frames, first to one past the last.

    Both ends are taken, so the spacing is D/(2D-1) seconds and timestamps are not whole: 0.0, 1.2
    and 2.4 for 3 s. That is what the released model was trained on, so it is kept.

    Args:
        bound: (start, end) in seconds; the whole video without it.
        time_offset: seconds added to the timestamps.
        max_units: with more units than this, so many evenly, by strategy "average"; -1: no limit.

    Raises:
        ValueError: no frames, no frame rate, or a bound that holds no frame.
    """
    _check_video(num_frames, fps)
    start, end = _frame_range(num_frames, fps, bound)
    duration = math.ceil((end - start + 1) / fps)
    num_units = math.ceil(units_per_second * duration)
    if 0 < max_units < num_units:
        num_units, strategy, stop = max_units, "average", float(end)
    else:
        stop = num_units // units_per_second * fps + start
    # float32 and half to even, as official: a float64 spacing rounds some indices differently.
    spaced = torch.linspace(start, stop, 2 * num_units, dtype=torch.float32).round()
    indices = spaced.clamp(max=end).long().tolist()
    stamps = [f"second{{{index / fps + time_offset:.1f}}}:" for index in indices[::2]]
    return FrameSample(
        frame_indices=tuple(indices),
        timestamps=tuple(stamps),
        strategy=strategy,
        duration=duration,
    )


def sample_video(
    num_frames: int,
    fps: float,
    *,
    bound: tuple[float, float] | None = None,
    time_offset: float = 0.0,
    max_units: int = 128,
    tail_skip: int = 5,
) -> FrameSample:
    """Sample by `video`: 4 fps up to 4 s, then some 16 frames up to 16 s, then 1 fps up to 256 s.

    Beyond, 2 * `max_units` frames evenly. Frames stand in the middle of their intervals, and none
    is later than `tail_skip` before the last; timestamps are those before that limit, as official.

    Raises:
        ValueError: no frames, no frame rate, or a clip or bound too short for a single frame.
    """
    _check_video(num_frames, fps)
    last, max_frames = num_frames - 1, 2 * max_units
    seconds = last / fps if bound is None else bound[1] - bound[0]
    rate = 0.5 if seconds <= SLOW_SECONDS else math.ceil(seconds / max_frames)
    start = 0 if bound is None else max(0, _round_half_up(float(bound[0]) * fps))
    end = last if bound is None else min(_round_half_up(float(bound[1]) * fps), last)
    indices = _centered(start, end, fps, rate, max_frames) if end > start else []
    if not indices:
        where = "" if bound is None else f" from {bound[0]:g} to {bound[1]:g} s"
        raise ValueError(
            f"a video of {num_frames} frames at {fps:g} fps{where} is too short for the rule "
            "'video': take 'multimodal_interleaved', or a longer video"
        )
    if len(indices) % 2:
        indices.append(indices[-1])
    times = [_tenths(index / fps) for index in indices[::2]]
    stamps = times if time_offset <= 0 else [f"{t + time_offset:.1f}" for t in times]
    # Official code lets a clip of under six frames count from its end; here the first frame is
    # the least.
    limit = max(last - tail_skip, 0)
    return FrameSample(
        frame_indices=tuple(min(index, limit) for index in indices),
        timestamps=tuple(f"second{{{stamp}}}:" for stamp in stamps),
        strategy="average",  # units are not a second apart
        duration=max(times),
    )


def sample_plain(num_frames: int, fps: float) -> FrameSample:
    """Sample by `plain_2fps` what is on screen at 0.0, 0.5, 1.0 s ..; timestamps are whole seconds.

    Raises:
        ValueError: no frames, or no frame rate.
    """
    _check_video(num_frames, fps)
    num_units = math.ceil(num_frames / fps)
    indices = [min(int(i / 2 * fps), num_frames - 1) for i in range(2 * num_units)]
    return FrameSample(
        frame_indices=tuple(indices),
        timestamps=tuple(f"second{{{second:.1f}}}:" for second in range(num_units)),
        strategy="sequential",
        duration=num_units,
    )


def _centered(start: int, end: int, fps: float, rate: float, max_frames: int) -> list[int]:
    """Return rising indices in [start, end), from the middle of each interval of `video`."""
    if fps <= rate:
        return [math.floor(i) for i in np.arange(start, end, 1 / rate)]

    def middles(step: int) -> list[int]:
        spaced = np.arange(start + step / 2, end, step)
        return [min(_round_half_up(float(i)), end - 1) for i in spaced]

    indices = middles(_round_half_up(fps / rate))
    higher_rate = min(MIN_FRAMES / ((end - start) / fps), MAX_RATE)
    if higher_rate > rate:
        # Not in official code, which divides by zero there: videos of under 2 fps, a step of 0.
        indices = middles(max(_round_half_up(fps / higher_rate), 1))
    if len(indices) > max_frames:
        indices = np.linspace(start, end - 1, max_frames, dtype=int).tolist()
    return indices


def _frame_range(num_frames: int, fps: float, bound: tuple[float, float] | None) -> tuple[int, int]:
    """Return the first and last frame within (start, end) seconds, both inclusive."""
    if bound is None:
        return 0, num_frames - 1
    start_time, end_time = (max(0.0, min(time, num_frames / fps)) for time in bound)
    start = math.ceil(start_time * fps)
    end = min(math.floor(end_time * fps), num_frames - 1)
    if end < start:
        raise ValueError(
            f"bound {bound[0]:g} to {bound[1]:g} s holds no frame of a video of {num_frames} "
            f"frames at {fps:g} fps ({num_frames / fps:.1f} s): start must lie before the end of "
            "the video and before the end of the bound"
        )
    return start, end


def _round_half_up(value: float) -> int:
    return int(Decimal(value).quantize(Decimal(1), rounding=ROUND_HALF_UP))


def _tenths(value: float) -> float:
    return float(Decimal(value).quantize(Decimal("0.1"), rounding=ROUND_HALF_UP))


def _check_video(num_frames: int, fps: float) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: the video has no frame; check the file")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps}: the video has no frame rate; re-encode it at a constant one")
