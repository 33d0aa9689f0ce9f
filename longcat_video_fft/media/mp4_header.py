"""Size, rotation, rate, length and codec of an mp4 or mov file, from its header alone.

Place in the data flow: object in S3 -> ranged reads (`read_range`) -> VideoHeader -> which videos
and frames are trained on. The pictures are never read: a usual file takes one or two reads and at
most 256 KB, wherever its header is. mp4_boxes.py reads the boxes (ISO/IEC 14496-12).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longcat_video_fft.media.mp4_boxes import (
    MAX_FRAMES,
    HeaderError,
    Movie,
    Runs,
    check_frames,
    measure_box,
    parse_fragment,
    parse_index,
    parse_movie,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HeaderError", "VideoHeader", "read_header"]

HEAD_BYTES = 64 * 1024  # the first read
TAIL_BYTES = 192 * 1024  # a read behind mdat, where moov is thought to be
FRAGMENT_BYTES = 16 * 1024  # a read at a fragment: its moof, not its pictures
NEXT_BYTES = 1024  # read on behind moov, so that the size of mdat is seen too
MAX_REQUESTS = 80
MAX_HEADER_BYTES = 16 * 1024 * 1024  # in all reads
MAX_SECONDS = 100 * 3600
SAMPLED_FRAGMENTS = 16  # read when a file has far too many, and an index of them

BOX_HEAD = 16
# What a file may begin with; anything else is no mp4 (4.3, and QuickTime's own).
FIRST_BOXES = frozenset(b"ftyp styp moov moof mdat free skip wide uuid sidx pdin pnot".split())


@dataclass(frozen=True, kw_only=True)
class VideoHeader:
    """A header describes the (first) video track.

    Pixels are as stored: pasp and clap are not applied. Frames that an edit list hides are
    counted, as they are in the file. Times in rounded units, such as 33 and 34 ms, are a variable
    rate too.
    """

    codec: str  # as FFmpeg calls it, or the file's own four letters
    width: int  # as displayed, after rotation
    height: int
    rotation: int  # degrees clockwise that a player turns the picture: 0, 90, 180, 270
    num_frames: int
    duration: float  # seconds that the frames are shown for
    fps: float  # num_frames / duration
    has_variable_rate: bool  # the last frame's duration not counted: muxers make it up


class _Source:
    """Reads an object in order; holds the bytes of the last reads from the last place on."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self.read_range = read_range
        self.size = size
        self.start = 0
        self.window = b""
        self.num_requests = 0
        self.num_bytes = 0

    def holds(self, start: int, num_bytes: int) -> bool:
        return self.start <= start and start + num_bytes <= self.start + len(self.window)

    def read(self, start: int, num_bytes: int, *, ahead: int = 0) -> memoryview:
        """Returns bytes within the object; a fetch takes up to `ahead` more behind them."""
        if not self.holds(start, num_bytes):
            kept = self.window[start - self.start :] if start >= self.start else b""
            behind = start + len(kept)
            wanted = min(num_bytes - len(kept) + ahead, self.size - behind)
            self.window = kept + self._fetch(behind, wanted)
            self.start = start
        offset = start - self.start
        return memoryview(self.window)[offset : offset + num_bytes]

    def _fetch(self, start: int, num_bytes: int) -> bytes:
        self.num_requests += 1
        self.num_bytes += num_bytes
        if self.num_requests > MAX_REQUESTS or self.num_bytes > MAX_HEADER_BYTES:
            raise HeaderError(
                f"the header has more than {MAX_HEADER_BYTES} bytes or {MAX_REQUESTS} pieces",
                "too_large",
            )
        data = self.read_range(start, num_bytes)[:num_bytes]
        if len(data) < num_bytes:
            raise HeaderError(
                f"{len(data)} of {num_bytes} bytes at byte {start}: shorter than it was",
                "truncated",
            )
        return data

    def read_box(self, position: int, *, ahead: int) -> tuple[bytes, int, int]:
        """Returns type, start and end of the contents of the box at `position`."""
        remaining = self.size - position
        head = self.read(position, min(BOX_HEAD, remaining), ahead=ahead)
        if remaining < 8 or (remaining < BOX_HEAD and head[:4] == b"\0\0\0\1"):
            raise HeaderError("the file ends within a box's header", "truncated")
        kind, head_bytes, num_bytes = measure_box(head, 0, remaining=remaining)
        if num_bytes > remaining:
            raise HeaderError(
                f"box {kind!r} would end at byte {position + num_bytes}, the file at {self.size}",
                "truncated",
            )
        return kind, position + head_bytes, position + num_bytes


def read_header(read_range: Callable[[int, int], bytes], size: int) -> VideoHeader:
    """Reads the header of an object of `size` bytes; `read_range(start, num_bytes)` gives its
    bytes.

    A file in fragments is read fragment by fragment. When they are too many for MAX_REQUESTS, its
    index or header must say how long it is, and the number of frames is reckoned from that.

    Raises:
        HeaderError: not a whole video; `reason` says why.
    """
    if size <= 0:
        raise HeaderError("the file has no bytes", "empty")
    source = _Source(read_range, size)
    movie, position, saw_media = _find_movie(source)
    if movie.is_fragmented:
        runs, seconds = _read_fragments(source, position, movie=movie)
    else:
        _check_rest(source, position, saw_media=saw_media)
        runs, seconds = [movie.track.runs], 0.0
    if movie.track.last_offset >= size:
        raise HeaderError(
            f"pictures at byte {movie.track.last_offset}, the file has {size}", "truncated"
        )
    return _describe(movie, runs, seconds=seconds)


def _find_movie(source: _Source) -> tuple[Movie, int, bool]:
    """Reads the moov box (8.2.1); returns it, where it ends, and whether a mdat was before it."""
    first = source.read(0, min(8, source.size), ahead=HEAD_BYTES - 8)
    if bytes(first[4:8]) not in FIRST_BOXES:
        raise HeaderError(f"begins with {bytes(first)!r}: not an mp4", "not_mp4")
    position, saw_media = 0, False
    while position < source.size:
        kind, start, end = source.read_box(position, ahead=TAIL_BYTES - BOX_HEAD)
        if kind == b"moov":
            moov = source.read(start, end - start, ahead=NEXT_BYTES)
            return parse_movie(moov), end, saw_media
        saw_media = saw_media or kind == b"mdat"
        position = end
    raise HeaderError("no moov box: truncated or not an mp4", "truncated")


def _check_rest(source: _Source, position: int, *, saw_media: bool) -> None:
    """Reads on to mdat, whose size reveals a file that was cut, and as far as costs no read."""
    while source.size - position >= 8:  # fewer are no box, and harmless
        if saw_media and not source.holds(position, min(BOX_HEAD, source.size - position)):
            return
        kind, _, position = source.read_box(position, ahead=NEXT_BYTES)
        saw_media = saw_media or kind == b"mdat"


def _read_fragments(source: _Source, position: int, *, movie: Movie) -> tuple[list[Runs], float]:
    """Returns sample durations, and the seconds of the whole file if not all fragments were read,
    else 0.

    `moof` (8.8.4) is read, `mdat` jumped over, and `sidx` (8.16.3) kept where it covers the file.
    """
    runs, seconds = [movie.track.runs], movie.seconds
    num_fragments, can_sample = 0, False
    if position >= source.size and not movie.track.runs.counts.sum():
        raise HeaderError("it ends before its first fragment", "truncated")
    try:
        while position < source.size:
            if can_sample and num_fragments >= SAMPLED_FRAGMENTS:
                return runs, seconds
            kind, start, end = source.read_box(position, ahead=FRAGMENT_BYTES - BOX_HEAD)
            if kind == b"moof":
                runs += parse_fragment(source.read(start, end - start, ahead=BOX_HEAD), movie)
                num_fragments += 1
            elif kind == b"sidx":
                index = source.read(start, end - start, ahead=FRAGMENT_BYTES)
                covered, count, num_bytes, offset = parse_index(index)
                if end + offset + num_bytes > source.size:
                    raise HeaderError("sidx lists more than the file holds", "truncated")
                if num_bytes > 0.9 * source.size:  # not one of an index for each fragment
                    seconds = covered
                    can_sample = num_bytes > count * FRAGMENT_BYTES and count > MAX_REQUESTS
            position = end
    except HeaderError as error:
        if error.reason != "too_large" or not seconds or not num_fragments:
            raise
        return runs, seconds
    return runs, 0.0


def _describe(movie: Movie, runs: list[Runs], *, seconds: float) -> VideoHeader:
    """Sums up the track; `seconds`: the whole file's when `runs` cover its start alone, else 0."""
    track = movie.track
    counts = np.concatenate([run.counts for run in runs])
    deltas = np.concatenate([run.deltas for run in runs])[counts > 0]
    counts = counts[counts > 0]
    num_frames = check_frames(Runs(counts, deltas))
    duration = int((counts * deltas).sum()) / track.timescale
    if not num_frames or not duration:
        raise HeaderError(f"{num_frames} frames in {duration} seconds")
    if seconds:
        num_frames, duration = round(num_frames * seconds / duration), seconds
    if not 0 < num_frames <= MAX_FRAMES or duration > MAX_SECONDS:
        raise HeaderError(f"{num_frames} frames in {duration} seconds")
    counts[-1] -= np.uint64(1)
    is_turned = track.rotation in (90, 270)
    return VideoHeader(
        codec=track.codec,
        width=track.height if is_turned else track.width,
        height=track.width if is_turned else track.height,
        rotation=track.rotation,
        num_frames=num_frames,
        duration=duration,
        fps=num_frames / duration,
        has_variable_rate=np.unique(deltas[counts > 0]).size > 1,
    )
