"""Turns pictures and video frames (uint8) into the patches that LongCat-ViT takes, and their grids.

After decoding, before `model/vision_encoder.py`: `resize_frames` (once a clip, its uint8 result is
what a cache keeps), then `to_patches` (at batching, on any device). `plan_pooling` says how many
positions of the language model each unit takes. Rules of meituan-longcat/LongCat-Flash-Omni,
encoders/utils.py, data/utils.py and data/data_processor.py, integer for integer.

A unit is a pair of frames, or a still picture taken twice: one item for the encoder.
T frames, U units, H and W pixels, h and w patches. A grid is (t, h, w) with t = 1 for a unit; it
has h * w / 2 tokens behind the projector. A pooled grid is (h, w), its width not yet halved either.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Grid = tuple[int, int, int]  # (t, h, w)
PooledGrid = tuple[int, int]  # (h, w)
# Kept by the official settings for variants that no released model has.
FIXED_SETTINGS = {"resolution_mode": "native", "relarge_ratio": 1, "temporal_patch_size": 2}


@dataclass(frozen=True)
class PixelConfig:
    """Has the names of the official vision/config.json; the last three are of the official demo.

    That file is not public: the limits of a picture are the technical report's (section 2.1), a
    side's multiple of 112 = 14 * 8 as well, and video limits that it leaves out are the picture's,
    as in the official code. All limits count patches, but `*_tokens_video`, `max_vision_length` and
    `omni_video_fix_post_pooling_tokens` count tokens of the language model.
    """

    patch_size: int = 14
    spatial_merge_size: int = 1
    resize_factor: int = 8
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    min_tokens: int = 576  # of a unit
    max_tokens: int = 5832
    min_tokens_video_vit: int = 576  # of a unit; kept only where the next line leaves room
    max_tokens_video_vit: int = 5832  # of all units of a video
    min_tokens_video: int = 576  # of a unit, after pooling
    max_tokens_video: int = 5832  # of all units of a prompt, after pooling
    max_vision_length: int = 28672  # likewise, and never exceeded
    omni_video_fix_post_pooling_times: float = -1  # > 0: this compress ratio instead
    omni_video_fix_post_pooling_tokens: int = -1  # > 0: the first unit's tokens instead

    def __post_init__(self) -> None:
        sizes = [f.name for f in dataclasses.fields(self) if f.name.startswith(("min_", "max_"))]
        for name in ["patch_size", "spatial_merge_size", "resize_factor", *sizes]:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: set a positive whole number")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: lower it"
            )
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name}={getattr(self, name)}: set 3 values, for R, G and B")

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> PixelConfig:
        """Read the keys of the official file; those of other modules are left aside.

        `v_post_squeeze` and `video_vit` are too: the official demo turns both on, whatever the
        file says. Raises ValueError, with `source`, for a variant that is unsupported.
        """
        for name, only in FIXED_SETTINGS.items():
            if values.get(name, only) != only:
                raise ValueError(f"{source}: {name}={values[name]}: only {only} is supported")
        known = {f.name for f in dataclasses.fields(cls)}
        chosen = {name: value for name, value in values.items() if name in known}
        for limit in ("min_tokens", "max_tokens"):
            for name in (f"{limit}_video_vit", f"{limit}_video"):
                if limit in chosen:
                    chosen.setdefault(name, chosen[limit])
        for name in ("image_mean", "image_std"):
            if name in chosen:
                chosen[name] = tuple(chosen[name])
        try:
            return cls(**chosen)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def fit_size(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, patch_size: int
) -> tuple[int, int]:
    """Fit (height, width) to multiples of `factor` within the limits; the aspect is kept.

    Rounding is half to even. The lower limit gives way to the upper one. An extreme aspect leaves
    the multiple of `factor`; the height stays one of the patch, the width of two (the projector
    joins two patches of a row). Raises ValueError where nothing would be left.
    """
    start = (height, width)
    if height < factor:
        height, width = factor, int(factor / height * width) + 1
    if width < factor:
        height, width = int(factor / width * height) + 1, factor
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = math.floor(height / shrink / factor) * factor
        columns = math.floor(width / shrink / factor) * factor
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    if rows < factor:
        rows, columns = factor, max_pixels // factor
    if columns < factor:
        rows, columns = max_pixels // factor, factor
    rows, columns = rows // patch_size * patch_size, columns // (2 * patch_size) * 2 * patch_size
    if rows == 0 or columns == 0:
        raise ValueError(
            f"{start[0]}x{start[1]} does not fit in {max_pixels // patch_size**2} patches: "
            "take fewer frames, or raise the limit (max_tokens, max_tokens_video_vit)"
        )
    return rows, columns


def resized_size(
    height: int, width: int, *, num_frames: int, config: PixelConfig
) -> tuple[int, int]:
    """Return (height, width) that every frame of a clip is resized to; one frame is a picture.

    The units of a video share `max_tokens_video_vit`, so many units get below `min_tokens`.
    """
    area = config.patch_size**2
    min_pixels, max_pixels = config.min_tokens * area, config.max_tokens * area
    if num_frames > 1:
        min_pixels = config.min_tokens_video_vit * area
        # Shared as pixels, not as patches: the remainder counts.
        max_pixels = min(config.max_tokens_video_vit * area // num_units(num_frames), max_pixels)
    return fit_size(
        height,
        width,
        factor=config.patch_size * config.spatial_merge_size * config.resize_factor,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        patch_size=config.patch_size,
    )


def num_units(num_frames: int) -> int:
    """Count the frame pairs; a single frame is a picture and makes one unit.

    Raises ValueError for no frames, and for an odd number above one.
    """
    if num_frames < 1 or (num_frames > 1 and num_frames % 2):
        raise ValueError(f"{num_frames} frames: give one, or an even number (units are pairs)")
    return max(1, num_frames // 2)


def unit_grids(height: int, width: int, *, num_frames: int, config: PixelConfig) -> list[Grid]:
    """Return the grid of every unit of a clip, before anything is decoded."""
    rows, columns = resized_size(height, width, num_frames=num_frames, config=config)
    grid = (1, rows // config.patch_size, columns // config.patch_size)
    return [grid] * num_units(num_frames)


def resize_frames(frames: np.ndarray | Tensor, config: PixelConfig) -> Tensor:
    """Resize uint8 (T, H, W, 3), or a picture (H, W, 3), to (T, H', W', 3), by PIL's bicubic.

    Raises ValueError for other shapes or types, and for an odd number of frames above one.
    """
    pixels = np.asarray(frames)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    _check_frames(tuple(pixels.shape), is_uint8=pixels.dtype == np.uint8)
    num_frames, height, width, _ = pixels.shape
    rows, columns = resized_size(height, width, num_frames=num_frames, config=config)
    resized = [
        np.asarray(Image.fromarray(frame).resize((columns, rows), Image.Resampling.BICUBIC))
        for frame in pixels
    ]
    return torch.from_numpy(np.stack(resized))


def to_patches(frames: Tensor, config: PixelConfig) -> tuple[Tensor, list[Grid]]:
    """Cut resized frames, uint8 (T, H, W, 3), to (U*h*w, 3*2*p*p) float32; return the U grids too.

    A row is a patch: (channel, frame in the pair, row, column); rows run over (unit, h, w). With
    spatial_merge_size s > 1, over (unit, h/s, w/s, s, s).
    """
    _check_frames(tuple(frames.shape), is_uint8=frames.dtype == torch.uint8)
    num_frames, height, width, _ = frames.shape
    patch, merge = config.patch_size, config.spatial_merge_size
    if height % (patch * merge) or width % (patch * math.lcm(2, merge)):
        raise ValueError(f"frames of {height}x{width} are not resized: call resize_frames first")
    if num_frames == 1:
        frames = frames.expand(2, -1, -1, -1)  # a still picture is its own neighbor
    units = num_units(len(frames))
    blocks = frames.reshape(
        units, 2, height // patch // merge, merge, patch, width // patch // merge, merge, patch, 3
    )
    rows = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).flatten(0, 4).flatten(2)  # (U*h*w, 3, 2*p*p)
    mean, std = (
        torch.tensor(values, device=frames.device)[:, None]
        for values in (config.image_mean, config.image_std)
    )
    pixels = rows.float().div_(255).sub_(mean).div_(std)
    return pixels.flatten(1), [(1, height // patch, width // patch)] * units


def _check_frames(shape: tuple[int, ...], *, is_uint8: bool) -> None:
    if len(shape) != 4 or shape[3] != 3 or 0 in shape or not is_uint8:
        kind = "uint8" if is_uint8 else "not uint8"
        raise ValueError(
            f"frames of shape {shape}, {kind}: give uint8 (T, H, W, 3), or (H, W, 3) for a picture"
        )
    num_units(shape[0])


def num_tokens(grid: Grid) -> int:
    """Count the positions of the language model that a unit takes before pooling."""
    return grid[1] * grid[2] // 2


def compress_ratio(unit_tokens: Sequence[int], config: PixelConfig) -> float:
    """Return by how much a prompt's units are pooled, from the tokens of each; 1: not at all.

    It is the fixed ratio, or the larger of the fixed tokens' and `max_tokens_video`'s; but as much
    more as `max_vision_length` asks for, in tenths, as _precess_global_vision_info of the official
    data/data_processor.py does.
    """
    total = sum(unit_tokens)
    ratio = total / config.max_tokens_video
    if config.omni_video_fix_post_pooling_times > 0:
        ratio = config.omni_video_fix_post_pooling_times
    elif config.omni_video_fix_post_pooling_tokens > 0:
        first = round(unit_tokens[0] / config.omni_video_fix_post_pooling_tokens, 1)
        ratio = max(first, ratio)
    else:
        ratio = max(1.0, ratio)
    if total / max(ratio, 1) > config.max_vision_length:
        ratio = math.ceil(total / config.max_vision_length * 10) / 10
    return ratio


def pooled_grid(grid: Grid, ratio: float, config: PixelConfig) -> PooledGrid:
    """Return (h, w), multiples of 2, whose h * w / 2 tokens are at most the unit's own / ratio.

    Raises ValueError where no token would be left.
    """
    if ratio <= 1:
        return grid[1:]
    patch = config.patch_size
    allowed = min(int(num_tokens(grid) / ratio), config.max_tokens)
    if allowed < 2:
        raise ValueError(
            f"a unit of {num_tokens(grid)} vision tokens, pooled by {ratio:g}, keeps {allowed}: "
            "take fewer frames, or raise max_vision_length or max_tokens_video"
        )
    height, width = fit_size(
        grid[1] * patch,
        grid[2] // 2 * patch,
        factor=2 * patch,
        min_pixels=config.min_tokens_video * patch**2,
        max_pixels=allowed * patch**2,
        patch_size=patch,
    )
    return height // patch, 2 * (width // patch)


def plan_pooling(
    items: Sequence[Sequence[Grid]], config: PixelConfig
) -> tuple[float, list[list[PooledGrid]]]:
    """Return the compress ratio of a prompt and the pooled grids of each picture or video of it.

    `items` has the grids of each item's units. The official code counts a video's frames where its
    lists hold units, so that whatever follows a video in the same prompt gets no grids, or the
    wrong ones. That is a slip, not a rule the model was taught: here each item keeps its own.
    """
    ratio = compress_ratio([num_tokens(grid) for item in items for grid in item], config)
    return ratio, [[pooled_grid(grid, ratio, config) for grid in item] for item in items]
