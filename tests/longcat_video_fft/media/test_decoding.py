"""Frames chosen by time, resized and cut, in the right colors: against painted videos."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from longcat_video_fft.media.bad_video import REASONS, BadVideoError
from longcat_video_fft.media.decoding import decode_sample
from longcat_video_fft.options.buckets import BucketRule

# Frame n is gray of this value: a frame says which one it is.
GRAYS = [16 + 11 * n for n in range(20)]


def rule(
    *shape: int, frames: tuple[int, ...] = (9, 5), fps: float | None = 15, crop: bool = True
) -> BucketRule:
    height, width = shape or (32, 48)
    return BucketRule(((height / width, (height, width)),), frames, fps, crop)


def encode(
    pictures: list[np.ndarray], *, rate: int = 30, times: list[float] | None = None
) -> bytes:
    """Encodes (H, W, 3) uint8 pictures as H.264, tagged BT.709; `times` in seconds."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = cast("Any", container.add_stream("libx264", rate=rate, options={"crf": "4"}))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = int(Colorspace.ITU709)
        stream.codec_context.color_range = int(ColorRange.MPEG)
        stream.codec_context.time_base = Fraction(1, 9000)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709
            )
            time = times[number] if times else number / rate
            frame.pts, frame.time_base = round(time * 9000), Fraction(1, 9000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def gray(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    return np.full((height, width, 3), GRAYS[number], np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """Says which painted frames these are."""
    means = frames.reshape(len(frames), -1).mean(1)
    return [int(np.abs(np.array(GRAYS) - mean).argmin()) for mean in means]


def test_thirty_frames_a_second_give_every_second_one() -> None:
    sample = decode_sample(encode([gray(n) for n in range(20)]), rule())
    assert str(sample.bucket) == "9x32x48"
    assert numbers(sample.frames) == [0, 2, 4, 6, 8, 10, 12, 14, 16]


def test_too_few_for_the_longest_bucket_fill_the_next() -> None:
    sample = decode_sample(encode([gray(n) for n in range(16)]), rule())
    assert str(sample.bucket) == "5x32x48"  # 16 frames at 30 are 8 at 15
    assert numbers(sample.frames) == [0, 2, 4, 6, 8]
    with pytest.raises(BadVideoError, match="gives 4 frames") as error:
        decode_sample(encode([gray(n) for n in range(8)]), rule())
    assert error.value.reason == "too_short"


def test_native_rate_takes_all() -> None:
    sample = decode_sample(encode([gray(n) for n in range(20)]), rule(fps=None))
    assert numbers(sample.frames) == list(range(9))


def test_slow_video_repeats_frames() -> None:
    sample = decode_sample(encode([gray(n) for n in range(8)], rate=10), rule())
    assert numbers(sample.frames) == [0, 0, 1, 2, 2, 3, 4, 4, 5]  # shown at k / 15 s


def test_a_variable_rate_goes_by_time() -> None:
    times = [0, 0.1, 0.11, 0.12, 0.4, 0.5, 0.55]
    data = encode([gray(n) for n in range(7)], times=times)
    sample = decode_sample(data, rule(frames=(5,)))
    assert numbers(sample.frames) == [0, 0, 3, 3, 3]  # at 0, .067, .133, .2, .267 s


def test_times_rounded_to_milliseconds_lose_no_frame() -> None:
    times = [round(n / 15, 3) for n in range(10)]
    data = encode([gray(n) for n in range(10)], rate=15, times=times)
    assert numbers(decode_sample(data, rule()).frames) == list(range(9))


def test_the_middle_is_cut_out_and_squeezed_without_crop() -> None:
    """A wide picture has three stripes: cutting keeps the middle one."""
    picture = np.zeros((64, 288, 3), np.uint8)
    picture[:, :96], picture[:, 96:192], picture[:, 192:] = 60, 120, 180
    data = encode([picture] * 12)
    cut = decode_sample(data, rule(frames=(5,))).frames
    assert cut.shape == (5, 32, 48, 3)
    assert np.abs(cut[:, :, 2:-2].astype(int) - 120).max() < 8
    squeezed = decode_sample(data, rule(frames=(5,), crop=False)).frames
    stripes = squeezed[0, 16, [8, 24, 40], 0].astype(int)
    assert np.abs(stripes - [60, 120, 180]).max() < 8


@pytest.mark.parametrize("color", [(200, 30, 40), (30, 180, 60), (40, 60, 200), (250, 250, 10)])
def test_painted_colors_come_back(color: tuple[int, int, int]) -> None:
    picture = np.broadcast_to(np.array(color, np.uint8), (64, 96, 3)).copy()
    frames = decode_sample(encode([picture] * 12), rule(frames=(5,))).frames
    assert np.abs(frames.astype(int) - color).max() <= 4


@pytest.mark.parametrize(("turn", "matrix"), [
    (90, (0, 65536, -65536, 0)), (180, (-65536, 0, 0, -65536)), (270, (0, -65536, 65536, 0)),
])  # fmt: skip
def test_a_rotation_tag_turns_the_picture(turn: int, matrix: tuple[int, ...]) -> None:
    """It is bright at the left as stored: at the top when turned clockwise by 90 degrees."""
    picture = np.full((64, 96, 3), 40, np.uint8)
    picture[:, :48] = 200
    data = bytearray(encode([picture] * 12))
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a version 0 box
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        data[at + place : at + place + 4] = value.to_bytes(4, "big", signed=True)
    shape = (32, 48) if turn == 180 else (48, 32)
    frame = decode_sample(bytes(data), rule(*shape, frames=(5,))).frames[0, :, :, 0].astype(int)
    height, width = shape
    bright = {
        90: frame[: height // 2 - 3],
        180: frame[:, width // 2 + 3 :],
        270: frame[height // 2 + 3 :],
    }[turn]
    assert bright.min() > 190
    assert frame.mean() == pytest.approx(120, abs=8)


def test_odd_sizes_and_upscaling() -> None:
    picture = np.full((50, 70, 3), 128, np.uint8)
    frames = decode_sample(encode([picture] * 12), rule(96, 160, frames=(5,))).frames
    assert frames.shape == (5, 96, 160, 3)
    assert np.abs(frames.astype(int) - 128).max() < 4


def test_a_cut_off_or_scrambled_video_is_named() -> None:
    noise = [np.random.default_rng(n).integers(0, 255, (64, 96, 3), np.uint8) for n in range(30)]
    whole = encode(noise)
    hits = 0
    for bad in (whole[: len(whole) // 2], b"", b"no video at all" * 100, whole[:40]):
        with pytest.raises(BadVideoError) as error:
            decode_sample(bad, rule())
        hits += error.value.reason in REASONS
    assert hits == 4


def test_the_same_bytes_give_the_same_frames() -> None:
    data = encode([gray(n) for n in range(20)])
    assert np.array_equal(decode_sample(data, rule()).frames, decode_sample(data, rule()).frames)
