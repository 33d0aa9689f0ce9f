"""The header of real mp4 files says what decoding them says; damaged ones are named as such."""

import math
import pickle
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from longcat_video_fft.media import mp4_header
from longcat_video_fft.media.mp4_boxes import FRAGMENT_RUN
from longcat_video_fft.media.mp4_header import HeaderError, read_header
from tests.longcat_video_fft.support.mp4_samples import (
    FASTSTART,
    FRAGMENTS,
    CountingSource,
    ask_pyav,
    box,
    make_file,
    make_trak,
    make_video,
    read,
    table,
)

INDEXED = {"movflags": "dash+frag_keyframe+empty_moov+global_sidx"}
CASES: dict[str, dict[str, Any]] = {
    "tail": {"options": {}},
    "faststart": {"options": FASTSTART},
    "fragments": {"options": FRAGMENTS},
    "fragments, the first in moov": {"options": {"movflags": "frag_keyframe"}},
    "fragments, moof as base": {"options": {"movflags": "frag_keyframe+default_base_moof"}},
    "fragments, an index": {"options": INDEXED},
    "mov": {"muxer": "mov"},
    "mov, mpeg4": {"muxer": "mov", "codec": "mpeg4"},
    "mpeg4": {"codec": "mpeg4"},
    "mjpeg": {"codec": "mjpeg"},
    "hevc": {"codec": "libx265", "codec_options": {"x265-params": "log-level=none"}},
    "vp9": {"codec": "libvpx-vp9"},
    "av1": {"codec": "libsvtav1", "options": FASTSTART},
    "30000/1001": {"rate": Fraction(30000, 1001)},
}
TIMES = [0, 40, 80, 130, 140, 300, 340, 380, 420, 500]
MEDIA = box(b"mdat", bytes(50))


def error_of(data: bytes) -> HeaderError:
    with pytest.raises(HeaderError) as caught:
        read(data)
    assert str(caught.value)
    return caught.value


def check_against_pyav(data: bytes) -> None:
    header = read(data)
    expected = ask_pyav(data)
    found = {name: getattr(header, name) for name in expected}
    assert math.isclose(found.pop("duration"), expected.pop("duration"), rel_tol=1e-9)
    assert found == expected
    assert header.fps == header.num_frames / header.duration


@pytest.mark.parametrize("has_audio", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_as_decoded(name: str, has_audio: bool) -> None:
    data = make_video(**CASES[name], has_audio=has_audio)
    check_against_pyav(data)
    assert not read(data).has_variable_rate
    assert math.isclose(read(data).fps, CASES[name].get("rate", 25), rel_tol=1e-3)


@pytest.mark.parametrize("options", [{}, FRAGMENTS])
def test_variable_rate(options: dict[str, str]) -> None:
    # Without B frames, since reordered frames make FFmpeg's own durations of packets differ.
    data = make_video(options=options, codec_options={"bf": "0"}, times=TIMES)
    check_against_pyav(data)
    header = read(data)
    assert header.has_variable_rate
    assert header.num_frames == len(TIMES)


def test_last_duration_does_not_vary() -> None:
    assert not read(make_file(make_trak(stts=(2, 9, 40, 1, 10)))).has_variable_rate
    assert read(make_file(make_trak(stts=(2, 9, 40, 2, 10)))).has_variable_rate
    assert read(make_file(make_trak(stts=(3, 1, 10, 9, 40, 1, 10)))).has_variable_rate


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("options", [{}, FRAGMENTS])
def test_rotation(degrees: int, options: dict[str, str]) -> None:
    data = bytearray(make_video(options=options))
    angle = math.radians(degrees)
    cos, sin = round(math.cos(angle)) << 16, round(math.sin(angle)) << 16
    struct.pack_into(
        ">9i", data, data.index(b"tkhd") + 44, cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30
    )
    check_against_pyav(bytes(data))
    header = read(bytes(data))
    assert header.rotation == degrees
    assert (header.width, header.height) == ((64, 96) if degrees in (90, 270) else (96, 64))


@pytest.mark.parametrize("options", [{}, FASTSTART])
@pytest.mark.parametrize("muxer", ["mp4", "mov"])
def test_few_reads(options: dict[str, str], muxer: str) -> None:
    data = make_video(
        muxer=muxer, options=options, num_frames=50, size=(320, 240), has_audio=True, is_noise=True
    )
    assert len(data) > 1_000_000
    source = CountingSource(data)
    header = read_header(source, len(data))
    assert header.num_frames == 50
    assert len(source.reads) <= 2
    assert sum(source.reads) <= 256 * 1024


@pytest.mark.parametrize("padding", [60_000, 65_490, 65_500, 65_510, 65_530])
def test_header_at_the_edge_of_a_read(padding: int) -> None:
    """The first read's end cuts moov, or the header of the next box."""
    trak = make_trak()
    for media in (MEDIA, box(b"mdat", bytes(500_000))):
        data = make_file(trak, box(b"udta", bytes(padding - len(trak))), rest=media)
        source = CountingSource(data)
        assert read_header(source, len(data)).num_frames == 10
        assert len(source.reads) <= 2
        data = box(b"free", bytes(padding)) + make_file(trak, rest=media)
        assert read(data).num_frames == 10
        assert error_of(data[:-1]).reason == "truncated"


def test_fragments_are_jumped_over() -> None:
    data = make_video(options=FRAGMENTS, num_frames=50, size=(320, 240), is_noise=True)
    source = CountingSource(data)
    assert read_header(source, len(data)).num_frames == 50
    assert sum(source.reads) < len(data) / 2
    assert len(source.reads) <= 1 + data.count(b"moof")


def test_long_header_takes_one_more_read() -> None:
    rng = np.random.default_rng(0)
    deltas = rng.integers(1, 90, 100_000)
    stts = (len(deltas), *np.stack([np.ones_like(deltas), deltas], 1).ravel().tolist())
    movie = make_file(make_trak(stts=stts), rest=b"")
    for data in (movie + MEDIA, box(b"mdat", bytes(300_000)) + movie):
        source = CountingSource(data)
        header = read_header(source, len(data))
        assert header.duration == deltas.sum() / 1000
        assert len(source.reads) == (2 if data.startswith(movie) else 3)


def test_sizes_of_64_bits() -> None:
    media = struct.pack(">I4sQ", 1, b"mdat", 16 + 200_000) + bytes(200_000)
    source = CountingSource(media + make_file(make_trak(), rest=b""))
    assert read_header(source, len(source.data)).num_frames == 10
    assert len(source.reads) == 2
    assert error_of(make_file(make_trak(), rest=media[:-1])).reason == "truncated"
    assert error_of(make_file(make_trak(), rest=media[:12])).reason == "truncated"
    assert error_of(struct.pack(">I4sQ", 1, b"mdat", 15) + bytes(99)).reason == "damaged"


def test_object_beyond_four_gigabytes() -> None:
    """Only its two ends exist; chunk offsets are 64 bits wide."""
    num_bytes = 5 << 30
    start = struct.pack(">I4sQ", 1, b"mdat", num_bytes)
    chunks = box(b"co64", struct.pack(">IIQQ", 0, 2, 16, num_bytes - 90))
    end = make_file(make_trak(chunks=chunks), rest=b"")

    def read_range(first: int, count: int) -> bytes:
        if first >= num_bytes:
            return end[first - num_bytes :][:count]
        return (start + bytes(count))[first : first + count]

    assert read_header(read_range, num_bytes + len(end)).num_frames == 10


def test_last_box_to_the_end() -> None:
    assert read(make_file(make_trak(), rest=struct.pack(">I4s", 0, b"mdat") + bytes(99)))
    movie = bytearray(make_file(make_trak(), rest=b""))
    struct.pack_into(">I", movie, movie.index(b"moov") - 4, 0)
    assert read(MEDIA + bytes(movie)).num_frames == 10


def test_version_1_boxes() -> None:
    for version in (0, 1):
        header = read(make_file(make_trak(version=version, timescale=500)))
        assert (header.width, header.height, header.duration) == (64, 32, 0.8)
        turned = bytearray(make_trak(version=version, size=(0, 0)))
        start = turned.index(b"tkhd") + (44 if version == 0 else 56)
        struct.pack_into(">5i", turned, start, 0, 1 << 16, 0, -1 << 16, 0)
        header = read(make_file(bytes(turned)))
        assert (header.width, header.height, header.rotation) == (24, 48, 90)
        trak = make_trak(version=version, stts=(0,), track_id=3)
        rest = make_fragment(flags=0x100, values=(40, 40), count=2, track_id=3)
        assert read(make_file(trak, extends=EXTENDS, rest=rest)).num_frames == 2


@pytest.mark.parametrize(
    ("fourcc", "codec"),
    [
        (b"avc3", "h264"),
        (b"hev1", "hevc"),
        (b"mp4v", "mpeg4"),
        (b"apch", "prores"),
        (b"ab1 ", "ab1"),
    ],
)
def test_codecs(fourcc: bytes, codec: str) -> None:
    assert read(make_file(make_trak(fourcc=fourcc))).codec == codec


@pytest.mark.parametrize(("object_type", "codec"), [(0x20, "mpeg4"), (0x61, "mpeg2video")])
def test_mp4v_is_known_by_its_descriptor(object_type: int, codec: str) -> None:
    config = bytes([4, 0x80, 0x80, 0x80, 13, object_type]) + bytes(12)
    esds = box(b"esds", bytes(4) + bytes([3, 0x80, 21, 0, 1, 0]) + config)
    assert read(make_file(make_trak(fourcc=b"mp4v", entry_boxes=esds))).codec == codec


def test_which_track() -> None:
    cover = make_trak(fourcc=b"jpeg", stts=(1, 1, 40), size=(500, 500))
    sound = make_trak(handler=b"soun", track_id=2)
    video = make_trak(track_id=3)
    assert read(make_file(cover, sound, video)).codec == "h264"
    assert read(make_file(cover, sound)).codec == "mjpeg"
    moving = make_trak(fourcc=b"jpeg", stts=(1, 2, 40))
    assert read(make_file(moving, video)).codec == "mjpeg"
    assert error_of(make_file(sound)).reason == "no_video"
    assert error_of(make_file()).reason == "no_video"


def test_size_of_the_track_where_the_entry_has_none() -> None:
    header = read(make_file(make_trak(size=(0, 0))))
    assert (header.width, header.height) == (48, 24)


def make_fragment(*, flags: int, values: tuple[int, ...], count: int, track_id: int = 1) -> bytes:
    tfhd = table(b"tfhd", track_id)
    run = box(FRAGMENT_RUN, struct.pack(f">II{len(values)}I", flags, count, *values))
    return box(b"moof", box(b"traf", tfhd + run))


def make_index(seconds: int, *, num_bytes: int) -> bytes:
    entries = struct.pack(">III", num_bytes, seconds * 1000, 0)
    head = struct.pack(">IIIII", 0, 1, 1000, 0, 0) + struct.pack(">HH", 0, 1)
    return box(b"sidx", head + entries)


EXTENDS = box(b"mvex", table(b"trex", 1, 1, 20, 0, 0) + table(b"trex", 2, 1, 99, 0, 0))
EMPTY = make_trak(stts=(0,))


def test_fragments_by_hand() -> None:
    defaults = make_fragment(flags=0x205, values=(0, 0, 7, 7, 7), count=3)  # sizes, durations none
    own = make_fragment(flags=0x301, values=(0, 40, 7, 50, 7), count=2)
    other = make_fragment(flags=0, values=(), count=9, track_id=2)
    rest = b"".join(part + MEDIA for part in (defaults, own, other))
    header = read(make_file(EMPTY, extends=EXTENDS, rest=rest))
    assert (header.num_frames, header.duration) == (5, 0.15)
    assert header.has_variable_rate
    header = read(make_file(make_trak(), extends=EXTENDS, rest=rest))  # ten samples in moov
    assert (header.num_frames, header.duration) == (15, 0.55)
    assert error_of(make_file(EMPTY, extends=EXTENDS, rest=rest[:-1])).reason == "truncated"
    assert error_of(make_file(EMPTY, extends=EXTENDS, rest=MEDIA)).reason == "damaged"


def test_too_many_fragments() -> None:
    """An error is raised, unless an index or mehd says how long the file is."""
    pair = make_fragment(flags=0, values=(), count=50) + box(b"mdat", bytes(100_000))
    rest = pair * 200  # each lasts a second
    assert error_of(make_file(EMPTY, extends=EXTENDS, rest=rest)).reason == "too_large"
    extends = box(b"mvex", table(b"trex", 1, 1, 20, 0, 0) + table(b"mehd", 200_000))
    index = make_index(200, num_bytes=len(rest))
    for data in (
        make_file(EMPTY, extends=extends, rest=rest),
        make_file(EMPTY, extends=EXTENDS, rest=index + rest),
    ):
        source = CountingSource(data)
        header = read_header(source, len(data))
        assert (header.num_frames, header.duration, header.fps) == (10_000, 200, 50)
        assert len(source.reads) <= mp4_header.MAX_REQUESTS
    indexed = make_file(EMPTY, extends=EXTENDS, rest=index + rest)
    assert error_of(indexed[:-1]).reason == "truncated"  # by the index
    part = make_index(1, num_bytes=len(pair)) + pair  # an index of each fragment says nothing
    assert error_of(make_file(EMPTY, extends=EXTENDS, rest=part * 200)).reason == "too_large"


def test_damaged_index() -> None:
    fragment = make_fragment(flags=0, values=(), count=2)
    for position, value in ((16, 0), (28, 200)):  # timescale, number of entries
        index = bytearray(make_index(1, num_bytes=10))
        struct.pack_into(">I", index, position, value)
        data = make_file(EMPTY, extends=EXTENDS, rest=bytes(index) + fragment)
        assert error_of(data).reason == "damaged"


def test_long_index_is_sampled() -> None:
    pair = make_fragment(flags=0, values=(), count=50) + box(b"mdat", bytes(100_000))
    head = struct.pack(">IIIII", 0, 1, 1000, 0, 0) + struct.pack(">HH", 0, 200)
    index = box(b"sidx", head + struct.pack(">III", len(pair), 1000, 0) * 200)
    source = CountingSource(make_file(EMPTY, extends=EXTENDS, rest=index + pair * 200))
    assert read_header(source, len(source.data)).num_frames == 10_000
    assert len(source.reads) <= mp4_header.SAMPLED_FRAGMENTS + 1


@pytest.mark.parametrize("options", [{}, FASTSTART, FRAGMENTS, INDEXED])
def test_truncated_anywhere(options: dict[str, str]) -> None:
    data = make_video(options=options, has_audio=True)
    reasons = {}
    for size in range(8, len(data), 7):
        try:
            read(data[:size])
        except HeaderError as error:
            reasons[size] = error.reason
        else:
            # A whole number of fragments is a file; only its list of fragments (mfra) is lost.
            assert "frag_keyframe" in options.get("movflags", "")
            assert b"mfra" in data[size - 8 :] or data[size : size + 8][4:] == b"moof"
    assert set(reasons.values()) == {"truncated"}
    assert len(reasons) > 100


def test_cut_before_the_pictures() -> None:
    """The cut is at the end of a box, so that no box is cut: the chunks' place reveals it."""
    data = make_video(options=FASTSTART)
    assert error_of(data[: data.index(b"mdat") - 4]).reason == "truncated"


def test_cut_before_the_first_fragment() -> None:
    data = make_video(options=FRAGMENTS)
    assert error_of(data[: data.index(b"moof") - 4]).reason == "truncated"


def test_cut_media_far_behind_the_header() -> None:
    padding = box(b"free", bytes(100_000))
    data = make_file(make_trak(), rest=padding + MEDIA)
    assert read(data).num_frames == 10
    assert error_of(data[:-1]).reason == "truncated"


def test_shorter_than_its_size() -> None:
    data = make_file(make_trak())
    with pytest.raises(HeaderError, match="shorter") as caught:
        read_header(CountingSource(data[:100]), len(data))
    assert caught.value.reason == "truncated"


def test_other_files() -> None:
    assert error_of(b"").reason == "empty"
    for data in (b"\0", b"Not a video, but a text.\n" * 99, bytes(5000), b"\x1aE\xdf\xa3" * 99):
        assert error_of(data).reason == "not_mp4"
    assert error_of(make_video("libvpx-vp9", "webm")).reason == "not_mp4"
    assert error_of(make_file()[:16] + MEDIA).reason == "truncated"


@pytest.mark.parametrize(
    "trak",
    [
        make_trak(size=(20_000, 64)),
        make_trak(timescale=0),
        make_trak(stts=(0,)),
        make_trak(stts=(1, 10, 0)),
        make_trak(stts=(1, 10_000_001, 1)),
        make_trak(stts=(2, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)),
        make_trak(stts=(1, 10, 0xFFFFFFFF)),
        make_trak(stts=(1_000_000, 10, 40)),
        make_trak(num_sizes=11),
        make_trak(fourcc=b"\0\1\2\3"),
        make_trak(chunks=table(b"stco", 0xFFFFFFFF, 1)),
        b"".join(box(b"free", b"") for _ in range(300)),
        make_trak()[:-1],
        make_trak() + box(b"free", bytes(9))[:-1],
    ],
)
def test_numbers_that_make_no_sense(trak: bytes) -> None:
    assert error_of(make_file(trak)).reason == "damaged"


def test_limits() -> None:
    huge = make_file(make_trak(), box(b"free", bytes(mp4_header.MAX_HEADER_BYTES)))
    source = CountingSource(huge)
    with pytest.raises(HeaderError) as caught:
        read_header(source, len(huge))
    assert caught.value.reason == "too_large"
    assert sum(source.reads) < 1_000_000  # an error before it is read
    scattered = box(b"mdat", bytes(300_000)) * 100 + make_file(make_trak())
    assert error_of(scattered).reason == "too_large"


def test_error_passes_between_processes() -> None:
    error = pickle.loads(pickle.dumps(HeaderError("no", "truncated")))
    assert (str(error), error.reason) == ("no", "truncated")
