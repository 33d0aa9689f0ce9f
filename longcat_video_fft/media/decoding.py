"""The bytes of a video -> the frames of one sample: chosen by time, resized, cut.

    bytes -> PyAV (FFmpeg) -> frames at 0, 1/fps, 2/fps, ... -> (T, H, W, 3) uint8

Runs in worker threads ahead of the GPU: FFmpeg decodes and scales without holding Python's lock.
What the header promised is not trusted: shape and length follow from the decoded pictures.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation

from longcat_video_fft.media.bad_video import BadVideoError
from longcat_video_fft.options.buckets import Bucket, BucketRule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# A frame counts as shown at t where it begins up to this much later: containers round times to
# milliseconds, and 1/15 s must still find the frame stamped 67 ms.
TIME_TOLERANCE_S = 0.002
HDR_TRANSFERS = (16, 18)  # PQ (SMPTE 2084) and HLG (ARIB B67) in ITU-T H.273


@dataclass(frozen=True)
class Sample:
    frames: np.ndarray  # (T, H, W, 3) uint8
    bucket: Bucket


def decode_sample(data: bytes, rule: BucketRule) -> Sample:
    """Decodes what the longest bucket takes, and cuts it to the longest one it suffices for.

    Raises:
        BadVideoError: truncated or damaged, no video track, HDR, or too short for any bucket.
    """
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.video:
                raise BadVideoError("no video track", "no_video")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the workers are the threads
            pixel_aspect = float(stream.sample_aspect_ratio or 1)
            frames, shape = _collect(_decode(container, stream), rule, pixel_aspect)
    except FFmpegError as error:
        raise BadVideoError(f"the decoder stops: {error.strerror}", "damaged") from error
    length = rule.choose_frames(len(frames))
    if length is None:
        raise BadVideoError(
            f"gives {len(frames)} frames, and the shortest bucket takes {min(rule.frames)}",
            "too_short",
        )
    return Sample(np.stack(frames[:length]), Bucket(length, *shape))


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[tuple[float, VideoFrame]]:
    """Yields (seconds since the first frame, frame), and last the time at which the last one
    ends."""
    first, last_end = None, 0.0
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise BadVideoError(f"its frame {number} is damaged", "damaged")
        if frame.color_trc in HDR_TRANSFERS:
            raise BadVideoError("its pictures are HDR (PQ or HLG)", "hdr")
        if frame.time is None:
            raise BadVideoError(f"its frame {number} has no time", "damaged")
        first = frame.time if first is None else first
        time = frame.time - first
        if frame.duration and frame.time_base:
            last_end = time + float(frame.duration * frame.time_base)
        else:
            last_end = time + 1 / float(stream.average_rate or 25)
        yield time, frame
    if first is None:
        raise BadVideoError("no picture can be decoded", "damaged")
    yield last_end, None  # pyright: ignore[reportReturnType]


def _collect(
    timed_frames: Iterator[tuple[float, VideoFrame]], rule: BucketRule, pixel_aspect: float
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Chooses at each k / fps the frame that is shown then; native rate: each frame once."""
    chosen: list[np.ndarray] = []
    shape = (0, 0)
    shown: VideoFrame | None = None
    for time, frame in timed_frames:
        if shown is not None:
            picture = None
            while len(chosen) < rule.frames[0] and (
                picture is None
                if rule.target_fps is None
                else len(chosen) / rule.target_fps < time - TIME_TOLERANCE_S
            ):
                picture = (
                    _cut(shown, _displayed_size(shown, pixel_aspect), shape, crop=rule.crop)
                    if picture is None
                    else picture
                )
                chosen.append(picture)
            if len(chosen) == rule.frames[0]:
                break
        elif frame is not None:
            shape = rule.choose_shape(*_displayed_size(frame, pixel_aspect))
        shown = frame
    return chosen, shape


def _displayed_size(frame: VideoFrame, pixel_aspect: float) -> tuple[float, float]:
    """Returns (height, width) in square pixels, after rotation."""
    height, width = float(frame.height), frame.width * pixel_aspect
    return (width, height) if frame.rotation % 180 else (height, width)


def _cut(
    frame: VideoFrame, size: tuple[float, float], shape: tuple[int, int], *, crop: bool
) -> np.ndarray:
    """Scales the frame to cover the shape and takes its middle, (H, W, 3) uint8; colors by the
    file's tags (BT.601 where it has none, as FFmpeg does)."""
    height, width = shape
    if crop:
        scale = max(shape[0] / size[0], shape[1] / size[1])
        height = max(height, round(size[0] * scale))
        width = max(width, round(size[1] * scale))
    is_turned = frame.rotation % 180 != 0
    scaled = frame.reformat(
        width=height if is_turned else width,
        height=width if is_turned else height,
        format="rgb24",
        interpolation=Interpolation.LANCZOS,
    )
    picture = scaled.to_ndarray()
    if frame.rotation:
        picture = np.rot90(picture, k=round(frame.rotation / 90))  # both counter-clockwise
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    return np.ascontiguousarray(picture[top : top + shape[0], left : left + shape[1]])
