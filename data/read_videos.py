"""Do videos show the color and the direction that captions ask for?

    python -m data.read_videos VIDEOS CAPTIONS [--readings FILE]

VIDEOS/**/NAME.mp4 is held against CAPTIONS/**/NAME.txt, by the detector of shapes.py. Printed is
one line of JSON: the shares that are right; chance; and what the same videos get when each is held
against the next one's caption, which a model that ignores its prompt would also get.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.error import FFmpegError

from data.shapes import COLORS, parse_caption, read_video

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_DIRECTIONS = 4
CHANCE = {
    "color": 1 / len(COLORS),
    "direction": 1 / NUM_DIRECTIONS,
    "both": 1 / len(COLORS) / NUM_DIRECTIONS,
}


@dataclass(frozen=True)
class Reading:
    """What a caption asks for and its video shows; None: nothing is found."""

    name: str
    caption: str
    color: str
    direction: str
    seen_color: str | None
    seen_direction: str | None


def read_videos(videos: Path, captions: Path) -> list[Reading]:
    """By name. Raises ValueError for a video without caption, or none at all."""
    texts = {path.stem: path for path in captions.rglob("*.txt")}
    paths = sorted(videos.rglob("*.mp4"), key=lambda path: path.stem)
    if not paths:
        raise ValueError(f"{videos}: holds no .mp4 file")
    readings = []
    for path in paths:
        if path.stem not in texts:
            raise ValueError(f"{path}: {captions} holds no {path.stem}.txt")
        caption = texts[path.stem].read_text("utf-8")
        asked = parse_caption(caption)
        seen = read_video(decode_video(path), directions=NUM_DIRECTIONS)
        readings.append(Reading(path.stem, caption, asked.color, asked.direction, *seen))
    return readings


def decode_video(path: Path) -> np.ndarray:
    """All frames, (T, H, W, 3) uint8. Raises ValueError when it is not a video."""
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: not a video that can be read ({error})") from error
    return np.stack(frames)


def shares(readings: Sequence[Reading], *, turned: int = 0) -> dict[str, float]:
    """How many are right; with `turned`, each held against the caption so many places on."""
    asked = [*readings[turned:], *readings[:turned]]
    pairs = list(zip(asked, readings, strict=True))
    color = [a.color == r.seen_color for a, r in pairs]
    direction = [a.direction == r.seen_direction for a, r in pairs]
    both = [c and d for c, d in zip(color, direction, strict=True)]
    named = {"color": color, "direction": direction, "both": both}
    return {name: sum(right) / len(right) for name, right in named.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.read_videos", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("videos", type=Path, metavar="VIDEOS")
    parser.add_argument("captions", type=Path, metavar="CAPTIONS")
    parser.add_argument("--readings", type=Path, help="write a line of JSON a video here")
    args = parser.parse_args(argv)
    try:
        readings = read_videos(args.videos, args.captions)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if args.readings:
        lines = [json.dumps(asdict(reading)) for reading in readings]
        args.readings.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = {
        "videos": len(readings),
        "right": shares(readings),
        "chance": CHANCE,
        "against_another_caption": shares(readings, turned=1),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
