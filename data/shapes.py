"""What the made videos show: moving colored shapes, captions, and a detector that reads them.

(seed, index) -> scene_of -> Scene -> caption and render_scene, which `data/make_videos.py` writes.
An evaluator goes the other way: parse_caption says what a text asks for, read_video what frames
show.
Lengths of a scene are fractions of the picture, so it can be drawn in any size and duration.

    scene = scene_of(0, 7, split="held_out")
    frames = render_scene(scene, width=96, height=64, num_frames=30)
    assert read_video(frames) == (scene.color, scene.direction)
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {
    "red": (225, 20, 25),
    "orange": (255, 140, 0),
    "yellow": (245, 235, 20),
    "green": (20, 200, 40),
    "cyan": (0, 220, 230),
    "blue": (30, 60, 245),
    "purple": (140, 30, 215),
    "pink": (255, 110, 195),
}
BACKGROUNDS = {
    "black": (8, 8, 8),
    "gray": (95, 95, 95),
    "white": (235, 235, 235),
    "navy": (12, 18, 75),
}
DIRECTIONS = {  # (right, down) in pixels; the first four are the plain ones
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
# From the first frame to the last, in parts of the side along which the shape moves. With RADII and
# MARGIN they fit into any picture of MIN_SIDE: 0.56 + 2 x 0.18 + 2 / 32 < 1.
SPEEDS = {"slowly": (0.34, 0.40), "quickly": (0.48, 0.56)}
RADII = (0.12, 0.18)  # parts of the shorter side
MARGIN = 1  # pixels between shape and border, so that the border shows the background alone
MIN_SIDE = 32
SPLITS = ("all", "train", "held_out")
PHRASINGS = (
    "{a} {color} {shape} moves {direction} over a {background} background.",
    "{a} {color} {shape} moves {speed} {direction} over a {background} background.",
    "On a {background} background, {a} {color} {shape} moves {direction}.",
    "The video shows {a} {color} {shape} moving {direction} on a {background} background.",
    "{a} {color} {shape} glides {direction} {speed}. The background is {background}.",
    "The background is {background}, and {a} {color} {shape} travels {speed} {direction}.",
)

# The detector's limits, on values 0 to 255 and parts of the picture.
MIN_CONTRAST = 50  # a pixel that differs less from the border, in all channels, is background
MIN_AREA = 0.005  # of the shorter side's square; a frame with fewer such pixels shows no shape
MAX_AREA = 0.4  # of the picture; nor does one with more
MIN_SHIFT = 0.08  # parts of the shorter side; the slowest scene shifts by 0.2
MAX_COLOR_DISTANCE = 90  # farther from all of COLORS, a color has no name


class Combination(NamedTuple):
    """What the split is decided by."""

    color: str
    shape: str
    direction: str


class Attributes(NamedTuple):
    """What a caption says; `speed` is None where it does not say it."""

    color: str
    shape: str
    direction: str
    background: str
    speed: str | None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One video; `radius` and `travel` are parts of the picture, `place` of the room left."""

    color: str
    shape: str
    direction: str
    background: str
    speed: str
    phrasing: int
    radius: float
    travel: float
    place: tuple[float, float]  # x, y

    @property
    def caption(self) -> str:
        """One sentence or two with each attribute once; half of the phrasings name the speed."""
        text = PHRASINGS[self.phrasing].format(
            a="an" if self.color[0] in "aeiou" else "a",
            color=self.color,
            shape=self.shape,
            direction=self.direction,
            background=self.background,
            speed=self.speed,
        )
        return text[0].upper() + text[1:]


def is_held_out(combination: Combination) -> bool:
    """The fixed rule of the split: about a fifth, by a digest, whatever the seed."""
    digest = hashlib.sha256("combination: {} {} {}".format(*combination).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 5 == 0


@functools.cache
def list_combinations(split: str = "all", directions: int = 4) -> tuple[Combination, ...]:
    """All combinations of a split, for 4 directions or, with the diagonals, 8."""
    if split not in SPLITS:
        raise ValueError(f"split={split}: choose from {', '.join(SPLITS)}")
    ways = _directions(directions)
    combinations = itertools.starmap(Combination, itertools.product(COLORS, SHAPES, ways))
    return tuple(c for c in combinations if split == "all" or is_held_out(c) == (split != "train"))


def scene_of(seed: int, index: int, *, split: str = "all", directions: int = 4) -> Scene:
    """The scene of one video: a function of the arguments alone."""
    combinations = list_combinations(split, directions)
    rng = random.Random(f"{seed}/video/{index}")
    chosen = rng.choice(combinations)
    speed = rng.choice(list(SPEEDS))
    return Scene(
        **chosen._asdict(),
        background=rng.choice(list(BACKGROUNDS)),
        speed=speed,
        phrasing=rng.randrange(len(PHRASINGS)),
        radius=rng.uniform(*RADII),
        travel=rng.uniform(*SPEEDS[speed]),
        place=(rng.random(), rng.random()),
    )


def parse_caption(text: str) -> Attributes:
    """Return what a caption says; raises ValueError unless it has each attribute exactly once."""
    words = re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())
    named: dict[str, str | None] = {}
    for field, known in (
        ("color", COLORS),
        ("shape", SHAPES),
        ("direction", DIRECTIONS),
        ("background", BACKGROUNDS),
        ("speed", SPEEDS),
    ):
        found = [word for word in words if word in known]
        if len(found) > 1 or (not found and field != "speed"):
            raise ValueError(
                f"caption {text!r}: has {len(found)} words for its {field}; "
                f"it needs one of {', '.join(known)}"
            )
        named[field] = found[0] if found else None
    return Attributes(**named)  # pyright: ignore[reportArgumentType]


def render_scene(scene: Scene, *, width: int, height: int, num_frames: int) -> np.ndarray:
    """Frames (T, H, W, 3) uint8: one shape that moves evenly and is whole in each of them."""
    radius = scene.radius * min(width, height)
    step = DIRECTIONS[scene.direction]
    # A diagonal is one in pixels (45 degrees), so both of its parts must fit the shorter side.
    side = min(width, height) if all(step) else abs(step[0]) * width + abs(step[1]) * height
    times = np.linspace(0, 1, num_frames)
    offsets = []
    for length, sign, place in zip((width, height), step, scene.place, strict=True):
        move = sign * scene.travel * side
        low = radius + MARGIN
        start = low + max(0, -move) + place * (length - 2 * low - abs(move))
        offsets.append(np.arange(length) + 0.5 - (start + move * times)[:, None])  # (T, length)
    x = offsets[0][:, None, :].astype(np.float32)  # (T, 1, W)
    y = offsets[1][:, :, None].astype(np.float32)  # (T, H, 1)
    # A pixel that the edge runs through is mixed: its center is less than half a pixel away.
    cover = np.clip(0.5 - _signed_distance(scene.shape, x, y, radius=radius), 0, 1)[..., None]
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    color = np.array(COLORS[scene.color], np.float32)
    return np.round(background + cover * (color - background)).astype(np.uint8)


def read_video(frames: np.ndarray, *, directions: int = 4) -> tuple[str | None, str | None]:
    """(color, direction) of what moves in (T, H, W, 3) uint8 frames; None where nothing is found.

    Guessing gets 1/8 of the colors right, and 1/4 of the directions (1/8 with directions=8). It
    looks at pixels that differ from the median of the border. Color: the nearest of COLORS to the
    median of the half of them that differs most (edges are mixed). Direction: from their centroid
    in the first third of the frames to that in the last third. It does not read the shape.
    """
    ways = _directions(directions)
    num_frames, height, width = frames.shape[:3]
    values = frames.astype(np.int16)
    top_bottom = values[:, [0, -1]].reshape(num_frames, -1, 3)
    sides = values[:, :, [0, -1]].reshape(num_frames, -1, 3)
    border = np.median(np.concatenate([top_bottom, sides], axis=1), axis=1)  # (T, 3)
    contrast = np.abs(values - border[:, None, None]).max(axis=-1)  # (T, H, W)
    mask = contrast > MIN_CONTRAST
    area = mask.sum(axis=(1, 2))
    seen = (area > MIN_AREA * min(width, height) ** 2) & (area < MAX_AREA * width * height)  # (T,)
    mask &= seen[:, None, None]
    if not seen.any():
        return None, None
    strong = mask & (contrast >= np.median(contrast[mask]))
    color = _nearest_color(np.median(values[strong], axis=0))

    third = max(1, num_frames // 3)
    if num_frames < 2 or not (seen[:third].any() and seen[-third:].any()):
        return color, None
    area = np.maximum(area, 1)  # frames that are not seen are not used either
    x = (mask.sum(axis=1) @ np.arange(width)) / area  # (T,)
    y = (mask.sum(axis=2) @ np.arange(height)) / area
    shift_x, shift_y = (
        axis[-third:][seen[-third:]].mean() - axis[:third][seen[:third]].mean() for axis in (x, y)
    )
    if math.hypot(shift_x, shift_y) < MIN_SHIFT * min(width, height):
        return color, None
    scores = {
        name: (shift_x * DIRECTIONS[name][0] + shift_y * DIRECTIONS[name][1])
        / math.hypot(*DIRECTIONS[name])
        for name in ways
    }
    return color, max(scores, key=scores.__getitem__)


def _directions(number: int) -> tuple[str, ...]:
    if number not in (4, 8):
        raise ValueError(f"directions={number}: choose from 4, 8")
    return tuple(DIRECTIONS)[:number]


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, *, radius: float) -> np.ndarray:
    """Pixels to the edge, negative inside; no shape reaches farther than `radius` on an axis."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.7 * radius) - 0.3 * radius
    across, up = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(across, up) - 0.88 * radius  # its corners stay sharp, about as big
    if shape == "triangle":  # equilateral, with a point up, and as far from above as from below
        y = y - 0.25 * radius
        return np.maximum(y, math.sqrt(0.75) * across - 0.5 * y) - 0.5 * radius
    arm = 0.32 * radius  # cross
    level = np.maximum(across - radius, up - arm)
    upright = np.maximum(across - arm, up - radius)
    return np.minimum(level, upright)


def _nearest_color(rgb: np.ndarray) -> str | None:
    distances = {name: math.dist(rgb, known) for name, known in COLORS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOR_DISTANCE else None
