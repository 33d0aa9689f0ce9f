"""Frames -> mp4 and back, for validation and `generate.py`. (Training's videos: decoding.py.)"""

from __future__ import annotations

from typing import TYPE_CHECKING

import av
from av.error import FFmpegError
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from longcat_video_fft.media.bad_video import BadVideoError
from longcat_video_fft.media.decoding import decode_sample
from longcat_video_fft.options.buckets import BucketRule

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

FPS = 15  # of what LongCat-Video generates
LONGEST_S = 240


def write_mp4(path: Path, frames: np.ndarray, *, fps: int = FPS, crf: int = 18) -> None:
    """Writes (T, H, W, 3) uint8 frames as H.264, atomically; H and W are even."""
    height, width = frames.shape[1:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    # faststart moves the index to the front, so that a player can begin before it has all.
    with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # x264's AVX-512 code gives other bytes each time (seen on a Sapphire Rapids).
        stream.options = {"crf": str(crf), "x264-params": "asm=avx2"}
        # Without these tags a player guesses the colors.
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    partial.replace(path)


def video_shape(path: Path) -> tuple[int, int]:
    """Returns (height, width) as shown.

    Raises:
        ValueError: not a video.
    """
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
    except (FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(f"{path}: not a video that can be read ({error}).") from error
    is_turned = frame.rotation % 180 != 0
    return (frame.width, frame.height) if is_turned else (frame.height, frame.width)


def read_frames(path: Path, shape: tuple[int, int], *, fps: float = FPS) -> np.ndarray:
    """Reads all frames at `fps`, cut to the shape as training's videos are: (T, H, W, 3) uint8.

    Raises:
        ValueError: not a video, or one that is too long to be held.
    """
    longest = round(LONGEST_S * fps)
    any_length = BucketRule(((1.0, shape),), tuple(range(longest, 0, -1)), target_fps=fps)
    try:
        frames = decode_sample(path.read_bytes(), any_length).frames
    except BadVideoError as error:
        raise ValueError(f"{path}: not a video that can be read ({error}).") from error
    if len(frames) == longest:
        raise ValueError(f"{path}: is longer than {LONGEST_S} s. Cut its end out, and give that.")
    return frames
