"""The boxes inside an mp4's header, as bytes: tracks, sample tables, fragments (ISO/IEC 14496-12).

Place in the data flow: mp4_header.py finds the header in an object -> its boxes are read here.
Every number may be hostile: a count is checked against the bytes of its box before it is used.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Reason = Literal["empty", "not_mp4", "truncated", "no_video", "damaged", "too_large"]

MAX_CHILDREN = 256  # of one box
MAX_FRAMES = 10_000_000
MAX_SIDE = 16384
FRAGMENT_RUN = b"trun"  # codespell:ignore trun

# Sample entries (8.5.2) by the name that FFmpeg gives their codec.
CODECS = {
    "h264": "avc1 avc2 avc3 avc4 dva1 dvav h264 H264 x264 X264",
    "hevc": "hvc1 hev1 dvh1 dvhe",
    "vvc": "vvc1 vvi1",
    "av1": "av01 dav1",
    "vp8": "vp08",
    "vp9": "vp09",
    "mpeg4": "mp4v DIVX XVID FMP4 3IV2",
    "h263": "s263 h263 H263",
    "prores": "apch apcn apcs apco ap4h ap4x",
    "dnxhd": "AVdn AVdh",
    "mjpeg": "jpeg mjpg mjpa",
    "cinepak": "cvid",
    "svq1": "SVQ1",
    "svq3": "SVQ3",
    "png": "png",
    "qtrle": "rle",
    "rawvideo": "raw",
}
CODEC_OF = {fourcc: name for name, fourccs in CODECS.items() for fourcc in fourccs.split()}
# Of an mp4v entry, by the object type in its esds (ISO/IEC 14496-1, 7.2.6.6).
MP4V_CODECS = {
    **dict.fromkeys(range(0x60, 0x66), "mpeg2video"),
    0x6A: "mpeg1video",
    0x6C: "mjpeg",
    0x6D: "png",
}


class HeaderError(ValueError):
    """A file's header is wrong; `reason` is the kind of error."""

    def __init__(self, message: str, reason: Reason = "damaged") -> None:
        super().__init__(message)
        self.reason: Reason = reason


class Runs(NamedTuple):
    """Gives sample durations: `counts[i]` samples of `deltas[i]` units of the track's timescale."""

    counts: np.ndarray  # (R,) uint64
    deltas: np.ndarray  # (R,) uint64


@dataclass(frozen=True, kw_only=True)
class Track:
    """A track holds a video; `width` and `height` are as stored, before `rotation`."""

    track_id: int
    codec: str
    width: int
    height: int
    rotation: int
    timescale: int
    runs: Runs
    last_offset: int  # where its last chunk starts; -1 when the header lists none

    @property
    def is_picture(self) -> bool:
        """Whether this is perhaps a cover, and not the video."""
        return self.codec in ("mjpeg", "png") and self.runs.counts.sum() == 1


@dataclass(frozen=True, kw_only=True)
class Movie:
    track: Track
    is_fragmented: bool
    default_delta: int  # duration of a sample in a fragment that says none
    seconds: float  # with all fragments, as mehd says; 0 when it does not


def measure_box(
    body: bytes | memoryview, position: int, *, remaining: int
) -> tuple[bytes, int, int]:
    """Returns the type, bytes of the box's own header, bytes in all (4.2).

    `remaining` is what its holder has left; the caller checks that the box ends within that.
    """
    num_bytes, kind = unpack(">I4s", body, position)
    head = 8
    if num_bytes == 1:
        head, num_bytes = 16, unpack(">Q", body, position + 8)[0]
    elif num_bytes == 0:
        num_bytes = remaining
    if num_bytes < head:
        raise HeaderError(f"box {kind!r}: a size of {num_bytes} bytes")
    return kind, head, num_bytes


def find_children(body: memoryview) -> dict[bytes, list[memoryview]]:
    """Returns the contents of the boxes in `body`, by type."""
    children: dict[bytes, list[memoryview]] = {}
    position = 0
    for _ in range(MAX_CHILDREN):
        if len(body) - position < 8:  # QuickTime may end a list with four zero bytes
            return children
        remaining = len(body) - position
        kind, head, num_bytes = measure_box(body, position, remaining=remaining)
        if num_bytes > remaining:
            raise HeaderError(f"box {kind!r}: ends {num_bytes - remaining} bytes behind its parent")
        children.setdefault(kind, []).append(body[position + head : position + num_bytes])
        position += num_bytes
    raise HeaderError(f"a box holds more than {MAX_CHILDREN} others")


def unpack(layout: str, body: bytes | memoryview, position: int) -> tuple[Any, ...]:
    try:
        return struct.unpack_from(layout, body, position)
    except struct.error as error:
        raise HeaderError("a box is too short for what it must hold") from error


def parse_movie(moov: memoryview) -> Movie:
    """Reads the movie's video track, and what its fragments take from the header (8.2.1)."""
    children = find_children(moov)
    found = [parse_track(trak) for trak in children.get(b"trak", [])]
    tracks = [track for track in found if track is not None]
    if not tracks:
        raise HeaderError(f"no video track among {len(found)} tracks", "no_video")
    track = next((track for track in tracks if not track.is_picture), tracks[0])
    if b"mvex" not in children:
        return Movie(track=track, is_fragmented=False, default_delta=0, seconds=0.0)
    extends = find_children(children[b"mvex"][0])
    default_delta, seconds = 0, 0.0
    for trex in extends.get(b"trex", []):  # 8.8.3
        track_id, _, delta = unpack(">III", trex, 4)
        if track_id == track.track_id:
            default_delta = delta
    if b"mehd" in extends and b"mvhd" in children:  # 8.8.2, 8.2.2
        mehd, mvhd = extends[b"mehd"][0], _first(children, b"mvhd")
        (units,) = unpack(">Q" if _version(mehd) == 1 else ">I", mehd, 4)
        (timescale,) = unpack(">I", mvhd, 20 if _version(mvhd) == 1 else 12)
        seconds = units / timescale if timescale else 0.0
    return Movie(track=track, is_fragmented=True, default_delta=default_delta, seconds=seconds)


def parse_track(trak: memoryview) -> Track | None:
    """Reads a track; None when it is not video (8.4.3)."""
    children = find_children(trak)
    if b"mdia" not in children:
        return None
    media = find_children(children[b"mdia"][0])
    if b"hdlr" not in media or bytes(media[b"hdlr"][0][8:12]) != b"vide":
        return None
    tkhd, mdhd = _first(children, b"tkhd"), _first(media, b"mdhd")
    table = find_children(_first(find_children(_first(media, b"minf")), b"stbl"))
    long = _version(tkhd) == 1  # 8.3.2
    (track_id,) = unpack(">I", tkhd, 20 if long else 12)
    *matrix, shown_width, shown_height = unpack(">9i2I", tkhd, 52 if long else 40)
    codec, width, height = _parse_sample_entry(_first(table, b"stsd"))
    if not width or not height:  # 16.16 fixed point, and the decoder knows better
        width, height = shown_width >> 16, shown_height >> 16
    if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE:
        raise HeaderError(f"a picture of {width} x {height}")
    (timescale,) = unpack(">I", mdhd, 20 if _version(mdhd) == 1 else 12)  # 8.4.2
    if not timescale:
        raise HeaderError("mdhd: a timescale of 0")
    return Track(
        track_id=track_id,
        codec=codec,
        width=width,
        height=height,
        # The matrix takes the point (1, 0) to (a, b), and y points down (6.2.2). FFmpeg takes
        # the angle of a mirrored picture the same way.
        rotation=round(math.degrees(math.atan2(matrix[1], matrix[0])) / 90) * 90 % 360,
        timescale=timescale,
        runs=_parse_durations(table),
        last_offset=_find_last_offset(table),
    )


def _parse_sample_entry(stsd: memoryview) -> tuple[str, int, int]:
    """Returns codec, width, height of the first sample entry (8.5.2, 12.1.3)."""
    kind, _, num_bytes = measure_box(stsd, 8, remaining=len(stsd) - 8)
    entry = stsd[8 : 8 + num_bytes]
    width, height = unpack(">HH", entry, 32)
    fourcc = kind.decode("latin-1").strip()
    if not fourcc.isprintable() or not fourcc:
        raise HeaderError(f"stsd: a codec called {kind!r}")
    codec = CODEC_OF.get(fourcc, fourcc)
    if fourcc == "mp4v":
        codec = MP4V_CODECS.get(_find_object_type(bytes(entry[:4096])), codec)
    return codec, width, height


def _find_object_type(entry: bytes) -> int:
    """Returns objectTypeIndication in the entry's esds; 0 when there is none."""
    position = entry.find(b"esds") + 8  # behind version and flags
    if position < 8:
        return 0
    for tag, fields in ((3, 3), (4, 0)):  # ES_Descriptor, in it DecoderConfigDescriptor
        if entry[position : position + 1] != bytes([tag]):
            return 0
        position += 1
        while entry[position : position + 1] >= b"\x80":  # a length of 7 bits a byte
            position += 1
        position += 1 + fields
    return entry[position] if position < len(entry) else 0


def _parse_durations(table: dict[bytes, list[memoryview]]) -> Runs:
    """Reads stts (8.6.1.2), and checks it against the number of samples in stsz or stz2 (8.7.3)."""
    runs = no_samples()
    if b"stts" in table:
        values = read_table(table[b"stts"][0], 4, ">u4", 2).astype(np.uint64)
        runs = Runs(values[:, 0], values[:, 1])
    num_frames = check_frames(runs)
    for sizes in table.get(b"stsz", []) + table.get(b"stz2", []):
        (num_sizes,) = unpack(">I", sizes, 8)
        if num_sizes != num_frames:
            raise HeaderError(f"stts counts {num_frames} samples, stsz {num_sizes}")
    return runs


def _find_last_offset(table: dict[bytes, list[memoryview]]) -> int:
    """Returns the largest chunk offset in stco or co64 (8.7.5)."""
    if b"co64" in table:
        offsets = read_table(table[b"co64"][0], 4, ">u8", 1)
    elif b"stco" in table:
        offsets = read_table(table[b"stco"][0], 4, ">u4", 1)
    else:
        return -1
    return int(offsets.max()) if offsets.size else -1


def parse_fragment(moof: memoryview, movie: Movie) -> list[Runs]:
    """Returns the durations of the track's samples in a moof (8.8.4 to 8.8.8)."""
    found: list[Runs] = []
    for traf in find_children(moof).get(b"traf", []):
        children = find_children(traf)
        tfhd = _first(children, b"tfhd")
        flags, track_id = unpack(">II", tfhd, 0)
        if track_id != movie.track.track_id:
            continue
        delta = movie.default_delta
        if flags & 0x8:
            position = 8 + (8 if flags & 0x1 else 0) + (4 if flags & 0x2 else 0)
            (delta,) = unpack(">I", tfhd, position)
        for run in children.get(FRAGMENT_RUN, []):
            found.append(_parse_run(run, delta))
            check_frames(found[-1])
    return found


def _parse_run(run: memoryview, delta: int) -> Runs:
    flags, count = unpack(">II", run, 0)
    if not flags & 0x100:  # no sample has a duration of its own
        return Runs(np.array([count], np.uint64), np.array([delta], np.uint64))
    start = 8 + (4 if flags & 0x1 else 0) + (4 if flags & 0x4 else 0)
    columns = (flags >> 8 & 0xF).bit_count()  # duration, size, flags, composition offset
    deltas = read_table(run, 4, ">u4", columns, start=start)[:, 0].astype(np.uint64)
    return Runs(np.ones_like(deltas), deltas)


def parse_index(sidx: memoryview) -> tuple[float, int, int, int]:
    """Returns the seconds, fragments and bytes that a sidx covers, and how far behind it they start
    (8.16.3).

    Track ids are not asked for: all tracks' fragments lie between each other, and last as long.
    """
    (timescale,) = unpack(">I", sidx, 8)
    long = _version(sidx) == 1
    (first_offset,) = unpack(">Q", sidx, 20) if long else unpack(">I", sidx, 16)
    start = 28 if long else 20  # two reserved bytes, then the count in two
    (count,) = unpack(">H", sidx, start + 2)
    if not timescale or count * 12 > len(sidx) - start - 4:
        raise HeaderError(f"sidx: {count} entries, a timescale of {timescale}")
    entries = np.frombuffer(sidx, ">u4", count * 3, start + 4).reshape(-1, 3).astype(np.uint64)
    num_bytes = int((entries[:, 0] & np.uint64(0x7FFFFFFF)).sum())
    return int(entries[:, 1].sum()) / timescale, count, num_bytes, first_offset


def read_table(
    body: memoryview, position: int, dtype: str, columns: int, *, start: int = 0
) -> np.ndarray:
    """Reads (rows, columns): the 32-bit count of rows is at `position`, the rows from `start` on,
    or else behind the count."""
    (count,) = unpack(">I", body, position)
    start = start or position + 4
    num_bytes = count * columns * np.dtype(dtype).itemsize
    if num_bytes > len(body) - start:
        raise HeaderError(f"a table of {count} entries in a box of {len(body)} bytes")
    if not count:
        return np.zeros((0, columns), dtype)
    return np.frombuffer(body, dtype, count * columns, start).reshape(count, columns)


def no_samples() -> Runs:
    return Runs(np.zeros(0, np.uint64), np.zeros(0, np.uint64))


def check_frames(runs: Runs) -> int:
    """Counts the samples. With MAX_FRAMES held, the sum of all durations fits 64 bits."""
    num_frames = int(runs.counts.sum())
    if num_frames > MAX_FRAMES:
        raise HeaderError(f"{num_frames} frames")
    return num_frames


def _version(body: memoryview) -> int:
    return unpack(">B", body, 0)[0]


def _first(children: dict[bytes, list[memoryview]], kind: bytes) -> memoryview:
    if kind not in children:
        raise HeaderError(f"no {kind.decode()} box in a track")
    return children[kind][0]
