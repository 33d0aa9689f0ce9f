"""Which shape and how many frames a video is given: pure arithmetic, used by planning and decoding.

T: frames, H, W: pixels; t, h, w: the same of latents. The VAE packs 4 frames (the first one
alone), and 8 x 8 pixels; the transformer takes 2 x 2 latents a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import Counter

LATENT_CHANNELS = 16
FRAME_STRIDE, PIXEL_STRIDE, TOKEN_STRIDE = 4, 8, 16
BF16_BYTES = 2
MAX_FRAMES = 93  # "never use video sequences longer than 93 frames in training" (LongCat-Video#4)
DEFAULT_FRAMES = (93, 73)
MAX_TOKENS = 512  # of a caption

# Official 480p shapes, (height, width) by the height/width that selects them
# (ASPECT_RATIO_627 in longcat_video/utils/bukcet_config.py).
SHAPES_480P: dict[float, tuple[int, int]] = {
    0.26: (320, 1216), 0.31: (352, 1120), 0.38: (384, 1024), 0.43: (416, 960), 0.52: (448, 864),
    0.58: (480, 832), 0.67: (512, 768), 0.74: (544, 736), 0.86: (576, 672), 0.95: (608, 640),
    1.05: (640, 608), 1.17: (672, 576), 1.29: (704, 544), 1.35: (736, 544), 1.50: (768, 512),
    1.67: (800, 480), 1.73: (832, 480), 2.00: (896, 448), 2.31: (960, 416), 2.58: (992, 384),
    2.75: (1056, 384), 3.09: (1088, 352), 3.70: (1184, 320), 3.80: (1216, 320), 3.90: (1248, 320),
    4.00: (1280, 320),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Bucket:
    """A bucket is what all samples of one batch have in common."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Returns (16, t, h, w)."""
        t = (self.num_frames - 1) // FRAME_STRIDE + 1
        return LATENT_CHANNELS, t, self.height // PIXEL_STRIDE, self.width // PIXEL_STRIDE

    @property
    def latent_bytes(self) -> int:
        return math.prod(self.latent_shape) * BF16_BYTES

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens that the transformer gets of a sample."""
        t = self.latent_shape[1]
        return t * (self.height // TOKEN_STRIDE) * (self.width // TOKEN_STRIDE)


def parse_bucket(text: str) -> Bucket:
    """Inverts `str(bucket)`."""
    num_frames, height, width = map(int, text.split("x"))
    return Bucket(num_frames, height, width)


def bucket_lines(numbers: Counter[Bucket]) -> list[str]:
    """Returns a table of how many samples each bucket has, the longest first."""
    total = numbers.total()
    return [
        f"  {bucket!s:>14} {number:>9,} ({100 * number / total:.1f} %), "
        f"{bucket.num_tokens:,} tokens each"
        for bucket, number in sorted(numbers.items(), reverse=True)
    ]


@dataclass(frozen=True)
class BucketRule:
    """A rule says how a video is cut to a bucket; it is part of the cache's identity.

    Args:
        shapes: (height, width) by the height/width that selects each.
        frames: lengths on offer, longest first, each 4n + 1.
        target_fps: frames a second of a sample; None takes the video's own frames one by one.
        crop: True cuts what sticks out of the shape, False squeezes the picture into it.
    """

    shapes: tuple[tuple[float, tuple[int, int]], ...] = tuple(SHAPES_480P.items())
    frames: tuple[int, ...] = DEFAULT_FRAMES
    target_fps: float | None = 15.0
    crop: bool = True

    def choose_shape(self, height: float, width: float) -> tuple[int, int]:
        """Makes the official choice: the label nearest to height/width (`get_condition_shape` in
        longcat_video/pipeline_longcat_video.py)."""
        ratio = height / width
        return min(self.shapes, key=lambda item: abs(item[0] - ratio))[1]

    def choose_frames(self, num_available: int) -> int | None:
        """Returns the longest length that `num_available` frames suffice for; None without one."""
        return next((length for length in self.frames if length <= num_available), None)

    def count_frames(self, *, num_frames: int, duration: float) -> int:
        """Returns how many frames a video of `duration` seconds gives at the target rate."""
        if self.target_fps is None:
            return num_frames
        return math.ceil(duration * self.target_fps - 1e-3)  # at 0, 1/fps, ... before the end

    def choose_bucket(self, *, height: float, width: float, num_available: int) -> Bucket | None:
        length = self.choose_frames(num_available)
        return None if length is None else Bucket(length, *self.choose_shape(height, width))
