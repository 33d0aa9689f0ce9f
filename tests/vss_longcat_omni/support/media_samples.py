"""Small real videos whose frames say which one they are, and speech that is noise."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
import soundfile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HEIGHT, WIDTH = 48, 96
TICKS = 9000  # a second


def paint(number: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3) uint8: eight stripes, light where the number has a bit, the top half red."""
    picture = np.full((height, width, 3), 20, np.uint8)
    for bit in range(8):
        picture[:, bit * width // 8 : (bit + 1) * width // 8] += 200 * (number >> bit & 1)
    picture[: height // 2, :, 1:] = 10
    return picture


def read_number(picture: np.ndarray) -> int:
    """Which painted frame (H, W, 3) is; the red of its stripes shows it in both halves."""
    width = picture.shape[1]
    middles = [picture[:, (2 * bit + 1) * width // 16, 0].mean() for bit in range(8)]
    return sum((middle > 110) << bit for bit, middle in enumerate(middles))


def make_video(
    path: Path,
    *,
    num_frames: int = 20,
    rate: int = 10,
    times: Sequence[float] | None = None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    sound: np.ndarray | None = None,
    sound_rate: int = 16000,
    gop: int = 8,
) -> Path:
    """`times`: seconds of each frame, for a variable rate. sound: (channels, samples) float."""
    with av.open(str(path), "w", format="mp4", options=muxer or {}) as container:
        settings = {"crf": "18", "g": str(gop), "bf": "3", "sc_threshold": "0", "threads": "1"}
        settings |= options or {}
        stream = cast("Any", container.add_stream(codec, rate=rate, options=settings))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        audio = None
        if sound is not None:
            layout = {1: "mono", 2: "stereo"}[len(sound)]
            audio = cast("Any", container.add_stream("aac", rate=sound_rate, layout=layout))
            block = av.AudioFrame.from_ndarray(sound.astype(np.float32), "fltp", layout)
            block.sample_rate, block.pts = sound_rate, 0
            container.mux(audio.encode(block))
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(paint(number), format="rgb24")
            time = times[number] if times else number / rate
            frame.pts, frame.time_base = round(time * TICKS), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            container.mux(audio.encode())
    return path


def shift_video(source: Path, path: Path, *, num_frames: int, rate: int = 10) -> Path:
    """A copy whose edit list cuts off the first frames: they are decoded, and not shown."""
    with av.open(str(source)) as given, av.open(str(path), "w", format="mp4") as container:
        stream = given.streams.video[0]
        copy = container.add_stream_from_template(stream)
        assert stream.time_base
        ticks = round(num_frames / rate / stream.time_base)
        for packet in given.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
                packet.stream = copy
                container.mux(packet)
    return path


def turn_video(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Writes (a, b, c, d) of the display matrix into the file's only track."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a version 0 box
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        struct.pack_into(">i", data, at + place, value << 16)
    path.write_bytes(data)


def make_speech(path: Path, seconds: float = 1.0, *, rate: int = 16000, level: float = 0.1) -> Path:
    noise = np.random.default_rng(0).normal(0, 1, round(seconds * rate))
    soundfile.write(path, np.clip(level * noise, -1, 1), rate)
    return path
