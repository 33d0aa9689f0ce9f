"""Small real videos, what PyAV says of them, and a source that counts what is read."""

import io
import struct
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np

from longcat_video_fft.media.mp4_header import VideoHeader, read_header

FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
FASTSTART = {"movflags": "faststart"}


class CountingSource:
    """Counts the calls of `read_range` over bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[int] = []

    def __call__(self, start: int, num_bytes: int) -> bytes:
        assert start >= 0
        assert num_bytes > 0
        self.reads.append(num_bytes)
        return self.data[start : start + num_bytes]


def read(data: bytes) -> VideoHeader:
    return read_header(CountingSource(data), len(data))


def make_video(
    codec: str = "libx264",
    muxer: str = "mp4",
    *,
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    num_frames: int = 20,
    size: tuple[int, int] = (96, 64),
    rate: Fraction = Fraction(25),
    times: list[int] | None = None,
    has_audio: bool = False,
    is_noise: bool = False,
) -> bytes:
    """Makes a video; `times` are presentation times in milliseconds, for a variable rate. Noise
    makes big files."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:  # faststart reads its own file again
        path = Path(folder) / "video"
        with av.open(str(path), "w", format=muxer, options=options or {}) as container:
            stream = cast(
                "Any", container.add_stream(codec, rate=rate, options=codec_options or {})
            )
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.codec_context.gop_size = 8
            stream.codec_context.thread_count = 1
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            audio = cast("Any", container.add_stream("aac", rate=16000)) if has_audio else None
            if audio is not None:
                sound = np.zeros((1, 16000), np.float32)
                frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, 0
                container.mux(audio.encode(frame))
            for index in range(num_frames if times is None else len(times)):
                pixels = np.full((size[1], size[0], 3), index * 10 % 256, np.uint8)
                if is_noise:
                    pixels = rng.integers(0, 256, pixels.shape, np.uint8)
                picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                picture.pts = index if times is None else times[index]
                picture.time_base = 1 / rate if times is None else Fraction(1, 1000)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
            if audio is not None:
                container.mux(audio.encode(None))
        return path.read_bytes()


def ask_pyav(data: bytes) -> dict[str, Any]:
    """Returns a VideoHeader, as far as decoding shows it."""
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        duration = sum(p.duration or 0 for p in packets) * float(cast("Any", stream.time_base))
    with av.open(io.BytesIO(data), "r") as container:
        frames = list(container.decode(video=0))
        codec = container.streams.video[0].codec_context.codec.canonical_name
    rotation = -frames[0].rotation % 360
    width, height = frames[0].width, frames[0].height
    return {
        "codec": codec,
        "width": height if rotation in (90, 270) else width,
        "height": width if rotation in (90, 270) else height,
        "rotation": rotation,
        "num_frames": len(frames),
        "duration": duration,
    }


def box(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I4s", len(contents) + 8, kind) + contents


def table(kind: bytes, *values: int) -> bytes:
    """Makes a full box of version 0 that holds 32-bit numbers."""
    return box(kind, bytes(4) + struct.pack(f">{len(values)}I", *values))


def make_trak(
    *,
    track_id: int = 1,
    handler: bytes = b"vide",
    fourcc: bytes = b"avc1",
    stts: tuple[int, ...] = (1, 10, 40),
    num_sizes: int | None = None,
    size: tuple[int, int] = (64, 32),
    timescale: int = 1000,
    version: int = 0,
    chunks: bytes = b"",
    entry_boxes: bytes = b"",
) -> bytes:
    """Makes a track by hand; `stts` is the box's numbers, its count of entries first."""
    times = ">4xII" if version == 0 else ">4xQQ"
    head = bytes([version]) + struct.pack(times, 0, 0)[1:]
    units = struct.pack(">I" if version == 0 else ">Q", 400)
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    shown = struct.pack(">II", 48 << 16, 24 << 16)
    tkhd = head + struct.pack(">II", track_id, 0) + units + bytes(16) + matrix + shown
    entry = bytes(24) + struct.pack(">HH", *size) + bytes(50) + entry_boxes
    stsd = bytes(4) + struct.pack(">I", 1) + box(fourcc, entry)
    count = sum(stts[1::2]) % (1 << 32) if num_sizes is None else num_sizes
    stbl = box(b"stsd", stsd) + table(b"stts", *stts) + table(b"stsz", 5, count) + chunks
    media = box(b"mdhd", head + struct.pack(">I", timescale) + units + bytes(4))
    media += box(b"hdlr", bytes(8) + handler + bytes(13))
    media += box(b"minf", box(b"stbl", stbl))
    return box(b"trak", box(b"tkhd", tkhd) + box(b"mdia", media))


def make_file(*traks: bytes, rest: bytes = box(b"mdat", bytes(50)), extends: bytes = b"") -> bytes:
    mvhd = box(b"mvhd", bytes(12) + struct.pack(">II", 1000, 400) + bytes(80))
    return box(b"ftyp", b"isom" + bytes(4)) + box(b"moov", mvhd + b"".join(traks) + extends) + rest
