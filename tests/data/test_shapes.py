"""data/shapes.py: captions tell what is drawn, the split is fixed, the detector is honest."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data.shapes import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    MARGIN,
    MIN_CONTRAST,
    PHRASINGS,
    SHAPES,
    SPEEDS,
    Combination,
    Scene,
    is_held_out,
    list_combinations,
    parse_caption,
    read_video,
    render_scene,
    scene_of,
)


def test_scenes_depend_on_their_arguments_alone() -> None:
    scenes = [scene_of(3, index) for index in range(300)]
    assert scenes == [scene_of(3, index) for index in range(300)]
    assert len(set(scenes)) == 300
    assert scenes != [scene_of(4, index) for index in range(300)]
    assert {scene.direction for scene in scenes} == {"left", "right", "up", "down"}
    assert {scene_of(3, i, directions=8).direction for i in range(300)} == set(DIRECTIONS)
    for field, known in (
        ("color", COLORS),
        ("shape", SHAPES),
        ("background", BACKGROUNDS),
        ("speed", SPEEDS),
        ("phrasing", range(len(PHRASINGS))),
    ):
        assert {getattr(scene, field) for scene in scenes} == set(known)
    # Another answer here means that every dataset that was made before has become another one.
    assert scene_of(0, 0).caption == "A blue ring glides down quickly. The background is navy."
    assert scene_of(0, 0).radius == pytest.approx(0.173082, abs=1e-6)


@pytest.mark.parametrize("directions", [4, 8])
def test_split_holds_out_a_fifth_and_no_pair_of_attributes(directions: int) -> None:
    everything, train, held_out = (
        set(list_combinations(split, directions)) for split in ("all", "train", "held_out")
    )
    assert len(everything) == 8 * 5 * directions
    assert train | held_out == everything
    assert not train & held_out
    assert 0.17 < len(held_out) / len(everything) < 0.23
    for fields in ((0, 1), (0, 2), (1, 2)):  # so what is unseen is the combination of three alone
        pairs = {tuple(c[field] for field in fields) for c in everything}
        assert {tuple(c[field] for field in fields) for c in train} == pairs
    for field in range(3):
        assert {c[field] for c in held_out} == {c[field] for c in everything}


def test_scenes_keep_to_their_split() -> None:
    for split, expected in (("train", {False}), ("held_out", {True}), ("all", {False, True})):
        captions = [parse_caption(scene_of(0, i, split=split).caption) for i in range(200)]
        held_out = {is_held_out(Combination(*told[:3])) for told in captions}
        assert held_out == expected


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ValueError, match="split=test: choose from all, train, held_out"):
        scene_of(0, 0, split="test")
    with pytest.raises(ValueError, match="directions=6: choose from 4, 8"):
        scene_of(0, 0, directions=6)
    with pytest.raises(ValueError, match="directions=6: choose from 4, 8"):
        read_video(np.zeros((3, 32, 32, 3), np.uint8), directions=6)


def test_parse_caption_inverts_every_caption() -> None:
    model = scene_of(0, 0)
    captions = set()
    for number, (color, shape, direction) in enumerate(list_combinations("all", 8)):
        for phrasing, wording in enumerate(PHRASINGS):
            for place, background in enumerate(BACKGROUNDS):
                scene = dataclasses.replace(
                    model,
                    color=color,
                    shape=shape,
                    direction=direction,
                    background=background,
                    speed=list(SPEEDS)[(number + place) % 2],
                    phrasing=phrasing,
                )
                speed = scene.speed if "{speed}" in wording else None
                told = (color, shape, direction, background, speed)
                assert parse_caption(scene.caption) == told, scene.caption
                captions.add(scene.caption)
    assert len(captions) == 320 * len(PHRASINGS) * len(BACKGROUNDS)
    assert all(caption.isascii() and caption.endswith(".") for caption in captions)
    assert any(caption.startswith("An orange") for caption in captions)
    assert not any("a orange" in caption.lower() for caption in captions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A circle moves left over a black background.", "has 0 words for its color"),
        ("A red blue circle moves left over a black background.", "has 2 words for its color"),
        ("A red circle moves over a black background.", "has 0 words for its direction"),
        ("A red circle moves left and up over a black wall.", "has 2 words for its direction"),
        ("", "it needs one of red, orange"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_caption(text)


def test_colors_are_far_apart_and_stand_out() -> None:
    colors = np.array(list(COLORS.values()))
    distances = np.linalg.norm(colors[:, None] - colors, axis=-1) + 999 * np.eye(len(colors))
    assert distances.min() > 90
    contrast = np.abs(colors[:, None] - np.array(list(BACKGROUNDS.values()))).max(axis=-1)
    assert contrast.min() >= 2 * MIN_CONTRAST


def centroids(frames: np.ndarray, scene: Scene) -> np.ndarray:
    """(x, y) of what is painted in each frame, (T, 2)."""
    weight = np.abs(frames - np.array(BACKGROUNDS[scene.background])).sum(axis=-1)  # (T, H, W)
    rows, columns = (np.arange(length) for length in frames.shape[1:3])
    along = [(weight.sum(axis=1) * columns).sum(axis=1), (weight.sum(axis=2) * rows).sum(axis=1)]
    return np.stack(along, axis=1) / weight.sum(axis=(1, 2))[:, None]


@pytest.mark.parametrize(
    ("width", "height", "num_frames"), [(96, 64, 30), (64, 96, 3), (32, 32, 9), (32, 200, 17)]
)
def test_shape_stays_whole_and_moves_far_enough(width: int, height: int, num_frames: int) -> None:
    for index in range(40):
        scene = scene_of(1, index, directions=8)
        frames = render_scene(scene, width=width, height=height, num_frames=num_frames)
        assert frames.shape == (num_frames, height, width, 3)
        assert frames.dtype == np.uint8
        painted = (frames != np.array(BACKGROUNDS[scene.background])).any(axis=-1)
        inner = painted[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
        assert inner.sum() == painted.sum(), scene
        step = np.array(DIRECTIONS[scene.direction])
        sides = np.full(2, min(width, height)) if step.all() else np.array([width, height])
        places = centroids(frames, scene)
        moved = places[-1] - places[0]
        assert (moved * step >= sides / 3)[step != 0].all(), scene
        assert np.diff(places, axis=0) == pytest.approx(  # evenly, and straight
            np.tile(step * sides * scene.travel / (num_frames - 1), (num_frames - 1, 1)), abs=0.15
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_their_area_and_soft_edges(shape: str) -> None:
    scene = dataclasses.replace(
        scene_of(0, 0), shape=shape, color="red", background="black", radius=0.18
    )
    frames = render_scene(scene, width=400, height=400, num_frames=3).astype(float)
    low, high = BACKGROUNDS["black"][0], COLORS["red"][0]
    cover = (frames[..., 0] - low) / (high - low)
    area = {
        "circle": np.pi,
        "square": (2 * 0.88) ** 2,
        "triangle": 3 * np.sqrt(3) / 4,
        "cross": 2 * 2 * 0.64 - 0.64**2,
        "ring": np.pi * (1 - 0.4**2),
    }[shape] * (0.18 * 400) ** 2
    assert cover.sum(axis=(1, 2)) == pytest.approx(area, rel=0.01)
    mixed = ((cover > 0.05) & (cover < 0.95)).sum()
    assert mixed > 0


@pytest.mark.parametrize(("width", "height"), [(96, 64), (32, 32), (256, 32)])
@pytest.mark.parametrize("directions", [4, 8])
def test_detector_reads_what_is_drawn(width: int, height: int, directions: int) -> None:
    wrong = []
    for index in range(100):
        scene = scene_of(5, index, directions=directions)
        frames = render_scene(scene, width=width, height=height, num_frames=6)
        if read_video(frames, directions=directions) != (scene.color, scene.direction):
            wrong.append(scene)
    assert wrong == []


def test_detector_follows_the_pixels() -> None:
    scene = dataclasses.replace(scene_of(0, 0), direction="up-left", color="red")
    frames = render_scene(scene, width=96, height=64, num_frames=12)
    assert read_video(frames[::-1], directions=8) == ("red", "down-right")
    assert read_video(frames[:, ::-1], directions=8) == ("red", "down-left")
    assert read_video(frames[:, :, ::-1], directions=8) == ("red", "up-right")
    broken = frames.copy()
    broken[10] = 0  # an empty frame
    broken[1] = np.random.default_rng(0).integers(0, 256, broken[1].shape)  # a frame of noise
    assert read_video(broken, directions=8) == ("red", "up-left")


def test_detector_claims_no_direction_without_motion() -> None:
    rng = np.random.default_rng(0)
    for index in range(20):
        noise = rng.integers(0, 256, (12, 64, 96, 3), np.uint8)
        assert read_video(noise)[1] is None
        faint = np.clip(rng.normal(128, 20, (12, 64, 96, 3)), 0, 255).astype(np.uint8)
        assert read_video(faint)[1] is None
        scene = scene_of(2, index)
        still = render_scene(scene, width=96, height=64, num_frames=12)[:1].repeat(12, axis=0)
        assert read_video(still) == (scene.color, None)
        assert read_video(still[:1]) == (scene.color, None)
    empty = np.full((12, 64, 96, 3), 77, np.uint8)
    assert read_video(empty) == (None, None)
    filled = empty.copy()
    filled[:, 2:-2, 2:-2] = COLORS["red"]  # a picture in a frame is no shape
    assert read_video(filled) == (None, None)


def test_detector_names_no_color_that_is_not_in_the_palette() -> None:
    scene = dataclasses.replace(scene_of(0, 0), background="black")
    frames = render_scene(scene, width=96, height=64, num_frames=12)
    whitened = np.where(frames.max(axis=-1, keepdims=True) > 100, 250, frames).astype(np.uint8)
    assert read_video(whitened) == (None, scene.direction)
