"""Shapes and lengths against the official table, sizes against arithmetic, captions' cleaning."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from longcat_video_fft.dataset.captions import EMPTY_CAPTION, caption_id, clean_caption
from longcat_video_fft.options.buckets import SHAPES_480P, Bucket, BucketRule, parse_bucket
from longcat_video_fft.precompute.survey import Survey

NUM_VIDEOS = 523_325
OFFICIAL = {93: Bucket(93, 480, 832), 73: Bucket(73, 480, 832)}


def test_there_are_26_shapes_of_about_one_area() -> None:
    assert len(SHAPES_480P) == 26
    assert len(set(SHAPES_480P.values())) == 26
    assert list(SHAPES_480P) == sorted(SHAPES_480P)
    for label, (height, width) in SHAPES_480P.items():
        assert height % 32 == 0
        assert width % 32 == 0
        assert height * width == pytest.approx(480 * 832, rel=0.07)
        assert height / width == pytest.approx(label, abs=0.02)


@pytest.mark.parametrize("label", SHAPES_480P)
def test_every_shape_is_reached(label: float) -> None:
    """Its own label reaches it, and so does a video of that very shape."""
    height, width = SHAPES_480P[label]
    rule = BucketRule()
    assert rule.choose_shape(label * 1000, 1000) == (height, width)
    assert rule.choose_shape(height, width) == (height, width)
    assert rule.choose_shape(4 * height, 4 * width) == (height, width)


@pytest.mark.parametrize(
    ("height", "width", "shape"),
    [
        (1080, 1920, (480, 832)),
        (720, 1280, (480, 832)),
        (1920, 1080, (832, 480)),
        (480, 640, (544, 736)),
        (640, 480, (736, 544)),
        (1000, 1000, (608, 640)),  # the first of two equally near ones, as officially
        (100, 10000, (320, 1216)),
        (10000, 100, (1280, 320)),
    ],
)
def test_usual_shapes(height: int, width: int, shape: tuple[int, int]) -> None:
    assert BucketRule().choose_shape(height, width) == shape


def test_random_shapes_get_the_nearest_label() -> None:
    rule = BucketRule()
    for _ in range(2000):
        height, width = random.randint(64, 4320), random.randint(64, 4320)
        chosen = rule.choose_shape(height, width)
        (label,) = [label for label, shape in SHAPES_480P.items() if shape == chosen]
        distances = [abs(other - height / width) for other in SHAPES_480P]
        assert abs(label - height / width) == min(distances)


def test_five_seconds_fall_in_73_frames() -> None:
    rule = BucketRule()
    for rate in (15, 23.976, 24, 25, 29.97, 30, 60):
        num_frames = round(5 * rate)
        available = rule.count_frames(num_frames=num_frames, duration=5.0)
        assert available == 75
    bucket = rule.choose_bucket(height=1080, width=1920, num_available=75)
    assert bucket == Bucket(73, 480, 832)


@pytest.mark.parametrize(
    ("duration", "count"),
    [(6.2, 93), (93 / 15, 93), (92 / 15, 92), (73 / 15, 73), (5.01, 76), (1 / 15, 1), (0.01, 1)],
)
def test_frames_at_15_a_second(duration: float, count: int) -> None:
    """Frames are taken at 0, 1/15, ... before the end; rounding of a duration adds none."""
    assert BucketRule().count_frames(num_frames=999, duration=duration) == count


def test_native_takes_every_frame() -> None:
    rule = BucketRule(target_fps=None)
    assert rule.count_frames(num_frames=150, duration=5.0) == 150


@pytest.mark.parametrize(
    ("available", "length"),
    [(1000, 93), (94, 93), (93, 93), (92, 73), (73, 73), (72, None), (0, None)],
)
def test_the_longest_that_is_filled(available: int, length: int | None) -> None:
    rule = BucketRule()
    assert rule.choose_frames(available) == length
    bucket = rule.choose_bucket(height=9, width=16, num_available=available)
    assert (bucket.num_frames if bucket else None) == length


def test_sizes() -> None:
    assert OFFICIAL[93].latent_shape == (16, 24, 60, 104)
    assert OFFICIAL[93].num_tokens == 37_440
    assert OFFICIAL[93].latent_bytes == 4_792_320
    assert OFFICIAL[73].latent_shape == (16, 19, 60, 104)
    assert OFFICIAL[73].num_tokens == 29_640
    assert Bucket(1, 480, 832).latent_shape == (16, 1, 60, 104)


@pytest.mark.parametrize(("frames", "terabytes"), [(73, 2.6), (93, 3.2)])
def test_the_whole_caches_size(frames: int, terabytes: float) -> None:
    """This is the source document's data set, with captions of 150 tokens on average."""
    found = Survey(
        buckets=Counter({OFFICIAL[frames]: NUM_VIDEOS}),
        num_captions=NUM_VIDEOS,
        num_tokens=150 * NUM_VIDEOS,
    )
    text = 150 * NUM_VIDEOS * 8192
    assert round((found.latent_bytes + text) / 1e12, 1) == terabytes
    *_, last = found.lines(4096)
    assert f"latents {found.latent_bytes / 1e9:,.2f} GB" in last
    assert f"caption embeddings {text / 1e9:,.2f} GB" in last


def test_names_come_back() -> None:
    assert str(OFFICIAL[93]) == "93x480x832"
    assert parse_bucket("93x480x832") == OFFICIAL[93]
    with pytest.raises(ValueError, match=r"unpack"):
        parse_bucket("93x480")


# What the official `prompt_clean` makes: basic_clean (ftfy, html.unescape twice, strip), then
# white space to one blank, strip. In this order: an entity of a blank is white space too.
@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A cat sits.", "A cat sits."),
        ("  A  cat\n\n sits\t. \r\n", "A cat sits ."),
        ("um\u3000gato\u00a0preto", "um gato preto"),
        ("sch\u00c3\u00b6n", "sch\u00f6n"),
        ("CafÃ© &amp; bar", "Café & bar"),
        ("\u00e2\u0153\u201d No problems", "\u2714 No problems"),
        ("\u201cquoted\u201d, it\u2019s", '"quoted", it\'s'),
        ("\ufb01lm", "film"),
        ("\uff21\uff22", "AB"),
        ("cafe\u0301", "caf\u00e9"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("A &lt; B", "A < B"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("&lt;b&gt; &amp;amp;lt;", "<b> <"),
        ("<b>x</b> &amp;amp; y", "<b>x</b> & y"),
        ("<b>x</b> &amp;amp;amp; y", "<b>x</b> &amp; y"),
        ("&nbsp;x&nbsp;&nbsp;y&nbsp;", "x y"),
        ("l&#39;eau &eacute;", "l'eau \u00e9"),
        ("\u732b\u304c\u5ea7\u308b", "\u732b\u304c\u5ea7\u308b"),
        ("\U0001f600 ok", "\U0001f600 ok"),
        (" \n\t", ""),
        ("", ""),
    ],
)
def test_captions_are_cleaned_as_officially(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


def test_captions_ids() -> None:
    assert caption_id("a") == caption_id("a")
    assert caption_id("a") != caption_id("A")
    assert EMPTY_CAPTION == caption_id(clean_caption(" ")) == "e3b0c44298fc1c149afbf4c8996fb924"
