"""Sound between the units of a video; the recorded official plans: test_streams_reference.py."""

from __future__ import annotations

from typing import Any

import pytest

from vss_longcat_omni.dataset.interleave import Part, plan_interleaved


def plan(num_units: int, num_audio_tokens: int, **options: Any) -> list[tuple[str, Any]]:
    """As (kind, text or count) pairs; timestamps are t0, t1 .., a unit has two tokens."""
    times = [f"t{unit}" for unit in range(num_units)]
    parts = plan_interleaved(times, [2] * num_units, num_audio_tokens, **options)
    return [(part.kind, part.text or part.count) for part in parts]


def unit(number: int) -> list[tuple[str, Any]]:
    return [("timestamp", f"t{number}"), ("image_tokens", 2)]


BEGIN, END = ("audio_begin", 1), ("audio_end", 1)


def pads(count: int) -> tuple[str, int]:
    return ("audio_pads", count)


def test_every_second_chunk_takes_the_odd_token() -> None:
    # 3 s are 37.5 tokens, so 38: 12, 13 and what is left.
    wanted = [*unit(0), BEGIN, pads(12), *unit(1), pads(13), *unit(2), pads(13), END]
    assert plan(3, 38) == wanted


def test_a_longer_video_begins_alone_and_longer_sound_ends_in_the_last_chunk() -> None:
    assert plan(3, 10) == [*unit(0), *unit(1), *unit(2), BEGIN, pads(10), END]
    assert plan(2, 60) == [*unit(0), BEGIN, pads(12), *unit(1), pads(48), END]


@pytest.mark.parametrize("options", [{}, {"strategy": "average"}])
def test_without_sound_there_is_no_tag(options: dict[str, Any]) -> None:
    assert plan(2, 0, **options) == [*unit(0), *unit(1)]


def test_average_deals_out_equal_shares_and_the_rest_at_the_end() -> None:
    wanted = [*unit(0), BEGIN, pads(3), *unit(1), pads(3), *unit(2), pads(5), END]
    assert plan(3, 11, strategy="average") == wanted
    few = [*unit(0), BEGIN, *unit(1), *unit(2), pads(2), END]
    assert plan(3, 2, strategy="average") == few


def test_a_single_unit_closes_what_it_opens() -> None:
    """As the official average strategy does not (with_official_tags in support/)."""
    assert plan(1, 7, strategy="average") == [*unit(0), BEGIN, pads(7), END]
    assert plan(1, 7) == [*unit(0), BEGIN, pads(7), END]


@pytest.mark.parametrize("strategy", ["sequential", "average"])
def test_no_token_is_lost_and_the_sound_is_tagged_once(strategy: str) -> None:
    for num_units in (1, 2, 3, 7, 16):
        for num_audio in (0, 1, 12, 13, 25, 26, 99, 375):
            parts = plan(num_units, num_audio, strategy=strategy)
            assert sum(count for kind, count in parts if kind == "audio_pads") == num_audio
            visible = [part for part in parts if part[0] in ("timestamp", "image_tokens")]
            assert visible == [part for number in range(num_units) for part in unit(number)]
            assert parts.count(BEGIN) == parts.count(END) == (num_audio > 0)


def test_empty_timestamps_write_nothing() -> None:
    parts = plan_interleaved([""], [3], 0)
    assert parts == (Part("image_tokens", count=3),)


def test_unequal_or_no_units_are_errors() -> None:
    with pytest.raises(ValueError, match="2 timestamps and 1 image token counts"):
        plan_interleaved(["a", "b"], [4], 10)
    with pytest.raises(ValueError, match="at least one pair"):
        plan_interleaved([], [], 10)


def test_units_that_do_not_make_a_chunk_are_errors() -> None:
    assert plan(4, 50, chunk_seconds=2)[-2:] == [pads(25), END]
    with pytest.raises(ValueError, match=r"3 pairs of frames.*chunks of 2 s.*chunk_seconds to 1"):
        plan(3, 38, chunk_seconds=2)
