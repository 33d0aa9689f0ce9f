"""Damaged mp4 files: a header or a HeaderError comes out, soon, within the limits on reads."""

import math
import random
import time
from typing import get_args

import pytest

from longcat_video_fft.media import mp4_header
from longcat_video_fft.media.mp4_boxes import FRAGMENT_RUN, MAX_FRAMES, MAX_SIDE, Reason
from longcat_video_fft.media.mp4_header import HeaderError, VideoHeader, read_header
from tests.longcat_video_fft.support.mp4_samples import (
    FASTSTART,
    FRAGMENTS,
    CountingSource,
    make_video,
)

EXTREMES = (0, 1, 7, 8, 9, 15, 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
BOXES = [
    *b"ftyp moov mvhd trak tkhd mdia mdhd hdlr minf stbl stsd stts stsz stco mvex trex".split(),
    *b"moof traf tfhd sidx mdat mfra free avc1 mp4v esds".split(),
    FRAGMENT_RUN,
]


def examples() -> list[bytes]:
    indexed = {"movflags": "dash+frag_keyframe+empty_moov+global_sidx"}
    return [
        make_video(has_audio=True),
        make_video(options=FASTSTART, has_audio=True),
        make_video(options=FRAGMENTS, has_audio=True),
        make_video(options=FRAGMENTS, times=[0, 40, 90, 100, 200], codec_options={"bf": "0"}),
        make_video(options=indexed),
        make_video("mpeg4", "mov", has_audio=True),
    ]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Returns `data` with one thing changed; mostly in its boxes, since pictures are not read."""
    changed = bytearray(data)
    kind = rng.randrange(6)
    present = [name for name in BOXES if name in data]
    anchor = data.index(rng.choice(present)) if present else 0
    position = min(max(anchor + rng.randrange(-8, 120), 0), max(len(data) - 1, 0))
    if kind == 0 and data:
        changed[position] ^= 1 << rng.randrange(8)
    elif kind == 1:  # the size of a box
        changed[max(anchor - 4, 0) : anchor] = rng.choice(EXTREMES).to_bytes(4, "big")
    elif kind == 2:  # any number in a box
        start = anchor + 4 * rng.randrange(1, 24)
        changed[start : start + 4] = rng.choice(EXTREMES).to_bytes(4, "big")
    elif kind == 3:
        size = rng.choice(EXTREMES) if rng.random() < 0.5 else rng.randrange(len(data) + 99)
        changed[max(anchor - 4, 0) : anchor] = b"\0\0\0\1"  # of 64 bits
        changed[anchor + 4 : anchor + 12] = (size << rng.choice((0, 0, 32))).to_bytes(8, "big")
    elif kind == 4:
        del changed[rng.randrange(len(data) + 1) :]
    else:  # a slice doubled
        end = position + rng.randrange(1, 600)
        changed[position:position] = data[position:end] * rng.choice((1, 1, 1, 50))
    return bytes(changed)


def check(data: bytes) -> str:
    """Returns "good", or the error's reason."""
    source = CountingSource(data)
    start = time.process_time()
    try:
        header = read_header(source, len(data))
    except HeaderError as error:
        outcome: str = error.reason if str(error) else "no message"
    else:
        assert isinstance(header, VideoHeader)
        assert 0 < header.width <= MAX_SIDE
        assert 0 < header.height <= MAX_SIDE
        assert header.rotation in (0, 90, 180, 270)
        assert 0 < header.num_frames <= MAX_FRAMES
        assert 0 < header.duration <= mp4_header.MAX_SECONDS
        assert math.isfinite(header.fps)
        assert header.fps > 0
        assert header.codec
        outcome = "good"
    assert outcome in ("good", *get_args(Reason))
    assert time.process_time() - start < 10  # 0.05 at most on an idle machine
    assert len(source.reads) <= mp4_header.MAX_REQUESTS
    assert sum(source.reads) <= mp4_header.MAX_HEADER_BYTES
    return outcome


def check_damaged(count: int, seed: int) -> None:
    rng = random.Random(seed)
    files = examples()
    assert {check(data) for data in files} == {"good"}
    outcomes = set()
    for _ in range(count):
        data = rng.choice(files)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = damage(data, rng)
        if rng.random() < 0.1:  # a mdat before it, so that the reads behind the first are tried
            data = (90_000).to_bytes(4, "big") + b"mdat" + bytes(89_992) + data
        outcomes.add(check(data))
    assert outcomes >= {"good", "truncated", "damaged", "not_mp4", "no_video"}


def test_damaged_files() -> None:
    check_damaged(1500, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_damaged_files(seed: int) -> None:
    check_damaged(20_000, seed)
