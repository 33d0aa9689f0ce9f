"""What a model of a trial makes of prompts that it never saw, judged by a detector of colours and
directions; with a picture of the first ones.

    prompts of unseen combinations -> videos -> data.shapes.read_video -> shares that are right

Used by trial's demo.py and small_result.py. Chance is 1/8 for the colour and 1/4 for the direction;
beside it stands what the same videos get when each is held against another one's prompt.
"""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
CHANCE = {"colour": 1 / 8, "direction": 1 / 4, "both": 1 / 32}
PROMPT_SEED = 1
BATCH = 50
GRID_FRAMES = 5
GAP = 2  # pixels between frames
LETTER_WIDTH, LINE_HEIGHT = 6, 13


@dataclass
class Reading:
    """One prompt, and what its video shows."""

    prompt: str
    colour: str
    direction: str
    seen_colour: str | None
    seen_direction: str | None


def held_out_prompts(count: int) -> list[Any]:
    """Scenes whose combination of colour, shape and direction no training video shows."""
    return [_shapes().scene_of(PROMPT_SEED, i, split="held_out") for i in range(count)]


def generate_videos(
    model: Path, prompts: Sequence[str], *, num_frames: int, height: int, width: int,
    steps: int, guidance: float, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """(N, T, H, W, 3) uint8, by the pipeline's own call."""
    import torch

    from longcat_video_fft.generate import load_pipeline

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(model, dtype=torch.bfloat16 if device.type == "cuda" else None)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(prompts), BATCH):
        frames = pipe(
            list(prompts[start : start + BATCH]), "", height=height, width=width,
            num_frames=num_frames, num_inference_steps=steps, guidance_scale=guidance,
            generator=generator, output_type="np",
        ).frames  # fmt: skip
        parts.append((frames * 255 + 0.5).astype(np.uint8))
    return np.concatenate(parts)


def read_videos(scenes: Sequence[Any], videos: np.ndarray) -> list[Reading]:
    readings = []
    for scene, video in zip(scenes, videos, strict=True):
        colour, direction = _shapes().read_video(video)
        readings.append(Reading(scene.caption, scene.colour, scene.direction, colour, direction))
    return readings


def shares(readings: Sequence[Reading], *, turned: int = 0) -> dict[str, float]:
    """How many are right; with `turned`, each held against the prompt so many places on."""
    asked = [*readings[turned:], *readings[:turned]]
    pairs = list(zip(asked, readings, strict=True))
    colour = [a.colour == r.seen_colour for a, r in pairs]
    direction = [a.direction == r.seen_direction for a, r in pairs]
    both = [c and d for c, d in zip(colour, direction, strict=True)]
    named = {"colour": colour, "direction": direction, "both": both}
    return {name: sum(right) / len(right) for name, right in named.items()}


def describe(title: str, readings: Sequence[Reading]) -> str:
    right, other = shares(readings), shares(readings, turned=1)
    parts = [
        f"{name} {right[name]:.0%} (against another prompt {other[name]:.0%}, chance {chance:.0%})"
        for name, chance in CHANCE.items()
    ]
    return f"{title}: {', '.join(parts)}, of {len(readings)} prompts"


def write_readings(path: Path, readings: Sequence[Reading]) -> None:
    lines = [json.dumps(asdict(reading)) for reading in readings]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_grid(path: Path, prompts: Sequence[str], videos: np.ndarray, *, columns: int = 2) -> None:
    """A PNG: each prompt over some frames of its video, first to last."""
    from PIL import Image, ImageDraw

    _, num_frames, height, width, _ = videos.shape
    chosen = np.linspace(0, num_frames - 1, min(GRID_FRAMES, num_frames)).round().astype(int)
    strip = len(chosen) * (width + GAP) - GAP
    texts = [textwrap.wrap(prompt, strip // LETTER_WIDTH) for prompt in prompts]
    text_height = max(map(len, texts)) * LINE_HEIGHT
    cell_width, cell_height = strip + 4 * GAP, text_height + height + 4 * GAP
    rows = -(-len(prompts) // columns)
    picture = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(picture)
    for number, (lines, video) in enumerate(zip(texts, videos, strict=True)):
        left, top = number % columns * cell_width, number // columns * cell_height
        for place, line in enumerate(lines):
            draw.text((left, top + place * LINE_HEIGHT), line, fill="black")
        for place, frame in enumerate(chosen):
            at = (left + place * (width + GAP), top + text_height)
            picture.paste(Image.fromarray(video[frame]), at)
    picture.save(path, optimize=True)


def _shapes() -> Any:
    """data/ lies beside this folder in the repository; it is no part of it."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from data import shapes

    return shapes
