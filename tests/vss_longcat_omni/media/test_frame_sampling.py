"""Frames and timestamps by each rule; the recorded official results: test_streams_reference.py."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from vss_longcat_omni.media.frame_sampling import (
    SamplingRule,
    sample_frames,
    sample_interleaved,
    sample_plain,
    sample_video,
)

RULES = get_args(SamplingRule)


def seconds(timestamps: tuple[str, ...]) -> list[float]:
    """The numbers, and that the text around them is as the model knows it."""
    found = [re.fullmatch(r"second\{(\d+\.\d)\}:", text) for text in timestamps]
    return [float(match[1]) for match in found if match is not None]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fps", [8.0, 24.0, 29.97, 60.0])
def test_frames_come_in_pairs_that_exist_in_order_with_a_timestamp(rule: Any, fps: float) -> None:
    for num_frames in (20, 61, 300, 1501):
        sample = sample_frames(num_frames, fps, rule=rule)
        indices = list(sample.frame_indices)
        assert indices == sorted(indices)
        assert 0 <= indices[0] <= indices[-1] < num_frames
        assert len(indices) == 2 * len(seconds(sample.timestamps))


def test_official_rule_for_sound_and_video_is_the_default() -> None:
    # 3 s: 6 frames from 0 to one past the last (90): steps of 18, the last held at 89.
    sample = sample_frames(90, 30.0)
    assert sample.frame_indices == (0, 18, 36, 54, 72, 89)
    assert seconds(sample.timestamps) == [0.0, 1.2, 2.4]
    assert sample.strategy == "sequential"


def test_more_units_than_allowed_are_spread_over_the_clip() -> None:
    sample = sample_interleaved(300, 30.0, max_units=2)
    assert sample.frame_indices == (0, 100, 199, 299)  # 299/3 = 99.67, 199.33
    assert sample.strategy == "average"
    assert sample_interleaved(300, 30.0, max_units=10).strategy == "sequential"


def test_plain_rule_takes_two_frames_a_second_and_whole_timestamps() -> None:
    sample = sample_plain(75, 30.0)  # 2.5 s
    assert sample.frame_indices == (0, 15, 30, 45, 60, 74)  # 75 is one past the last
    assert seconds(sample.timestamps) == [0.0, 1.0, 2.0]
    assert sample.strategy == "sequential"


def test_video_rule_stays_clear_of_the_clips_end() -> None:
    assert sample_video(30, 30.0).frame_indices == (4, 12, 20, 24)  # 28 is held at 29 - 5
    # Official code would ask for frame 4 - 5 = -1 here.
    assert set(sample_video(5, 5.0).frame_indices) == {0}


def test_video_rule_works_below_two_frames_a_second() -> None:
    """Official code divides by zero here."""
    assert len(sample_video(7, 1.0).frame_indices) == 6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("num_frames", "fps", "message"),
    [(0, 30.0, "num_frames=0"), (10, 0.0, "fps=0.0"), (10, float("nan"), "fps=nan")],
)
def test_a_video_without_frames_or_rate_is_an_error(
    rule: Any, num_frames: int, fps: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_frames(num_frames, fps, rule=rule)


def test_what_cannot_be_sampled_is_an_error_by_name() -> None:
    with pytest.raises(ValueError, match="'fast': choose one of multimodal_interleaved, video"):
        sample_frames(90, 30.0, rule="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="3 frames at 30 fps is too short for the rule 'video'"):
        sample_video(3, 30.0)
    with pytest.raises(ValueError, match="from 2 to 1 s is too short"):
        sample_video(90, 30.0, bound=(2.0, 1.0))
    with pytest.raises(ValueError, match="bound 4 to 5 s holds no frame of a video of 90 frames"):
        sample_interleaved(90, 30.0, bound=(4.0, 5.0))
