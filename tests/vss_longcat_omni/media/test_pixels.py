"""Frames to patches, budgets and pooled grids: official results, hand-counted cases, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.vss_longcat_omni.support.vision_reference import compare_geometry, compare_pixels
from vss_longcat_omni.media.pixels import (
    PixelConfig,
    compress_ratio,
    fit_size,
    plan_pooling,
    pooled_grid,
    resize_frames,
    resized_size,
    to_patches,
    unit_grids,
)

REFERENCE = Path(__file__).parents[2] / "reference"
PIXELS = REFERENCE / "longcat_omni_pixels.cases.safetensors"
GEOMETRY = REFERENCE / "longcat_omni_geometry.json"
SMALL = PixelConfig(
    resize_factor=2, min_tokens=4, max_tokens=40, min_tokens_video_vit=4, max_tokens_video_vit=32
)
LARGE = PixelConfig(max_tokens_video_vit=64000, min_tokens_video=128, max_tokens_video=8000)


def make_frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (num_frames, height, width, 3)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


# Recorded official results


def test_official_pixels() -> None:
    errors = dict(compare_pixels(PIXELS))
    assert len(errors) == 6  # two pictures, and pixels and grids of both batches
    assert max(errors.values()) < 1e-6, errors


def test_official_geometry() -> None:
    errors = dict(compare_geometry(GEOMETRY))
    content = json.loads(GEOMETRY.read_text())
    sections = ("images", "videos", "pooling", "conversations")
    assert len(errors) == sum(len(content[name]) for name in sections)
    assert set(errors.values()) == {0.0}, errors


@pytest.mark.parametrize(
    ("section", "index", "key"),
    [("images", 3, "tokens"), ("videos", 8, "units"), ("pooling", 1, "resized_tokens"),
     ("conversations", 1, "token_nums")],
)  # fmt: skip
def test_one_changed_integer_is_found(tmp_path: Path, section: str, index: int, key: str) -> None:
    content = json.loads(GEOMETRY.read_text())
    content[section][index][key] = 7
    (tmp_path / "changed.json").write_text(json.dumps(content))
    found = [name for name, error in compare_geometry(tmp_path / "changed.json") if error]
    assert len(found) == 1
    assert f".{key} is " in found[0]


def test_one_changed_pixel_and_an_unknown_tensor_are_found(tmp_path: Path) -> None:
    with safe_open(PIXELS, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["clip.pixel_values"][3, 5] += 0.01
    save_file(tensors, tmp_path / "changed.cases.safetensors", metadata=metadata)
    errors = dict(compare_pixels(tmp_path / "changed.cases.safetensors"))
    assert [name for name, error in errors.items() if error > 1e-5] == ["clip.pixel_values"]
    save_file(tensors | {"more": torch.ones(1)}, tmp_path / "more.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="more"):
        list(compare_pixels(tmp_path / "more.safetensors"))


# Patches


def test_a_row_is_one_patch_of_a_pair() -> None:
    frames = make_frames(4, 28, 56)
    rows, grids = to_patches(frames, SMALL)
    assert grids == [(1, 2, 4), (1, 2, 4)]
    assert rows.shape == (16, 1176)
    for unit, row, column in [(0, 0, 0), (0, 1, 2), (1, 0, 3)]:
        found = rows[unit * 8 + row * 4 + column].view(3, 2, 14, 14)
        patch = frames[
            2 * unit : 2 * unit + 2, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14
        ]
        scaled = patch.permute(3, 0, 1, 2).numpy() / 255
        mean, std = (np.array(v)[:, None, None, None] for v in (SMALL.image_mean, SMALL.image_std))
        np.testing.assert_allclose(found, (scaled - mean) / std, atol=1e-6)


def test_a_picture_is_its_own_pair() -> None:
    rows, grids = to_patches(resize_frames(make_frames(1, 30, 40)[0], SMALL), SMALL)
    assert grids == [(1, 2, 2)]
    first, second = rows.view(-1, 3, 2, 196).unbind(2)
    assert torch.equal(first, second)


def test_arrays_and_tensors_are_resized_alike() -> None:
    frames = make_frames(2, 33, 61)
    resized = resize_frames(frames, SMALL)
    assert resized.dtype == torch.uint8
    assert torch.equal(resize_frames(frames.numpy(), SMALL), resized)
    rows, columns = resized_size(33, 61, num_frames=2, config=SMALL)
    assert resized.shape == (2, rows, columns, 3)


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        (make_frames(3, 28, 28), "3 frames: give one, or an even number"),
        (make_frames(2, 28, 28).float(), "not uint8: give uint8"),
        (make_frames(2, 28, 28)[..., :1], "give uint8"),
        (make_frames(2, 28, 28)[:0], "give uint8"),
        (make_frames(1, 28, 28)[0, 0], "give uint8"),
    ],
)
def test_other_frames_are_errors(frames: torch.Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        resize_frames(frames, SMALL)


def test_frames_that_were_not_resized_are_errors() -> None:
    with pytest.raises(ValueError, match="30x56 are not resized: call resize_frames"):
        to_patches(make_frames(2, 30, 56), SMALL)
    with pytest.raises(ValueError, match="28x42 are not resized"):  # three patches in a row
        to_patches(make_frames(2, 28, 42), SMALL)


# Sizes


def test_sizes_are_rounded_half_to_even() -> None:
    limits = {"factor": 112, "min_pixels": 1, "max_pixels": 10**7, "patch_size": 14}
    assert fit_size(168, 280, **limits) == (224, 224)  # 1.5 and 2.5 times 112


def test_a_video_shares_its_budget_among_its_units() -> None:
    assert unit_grids(1080, 1920, num_frames=8, config=LARGE) == [(1, 56, 96)] * 4
    # 64000 / 128 = 500 patches a unit, below the least of a picture
    assert unit_grids(1080, 1920, num_frames=256, config=LARGE) == [(1, 16, 24)] * 128


def test_a_budget_that_leaves_no_patch_is_an_error() -> None:
    with pytest.raises(ValueError, match="1080x1920 does not fit in 3 patches: take fewer frames"):
        unit_grids(1080, 1920, num_frames=40000, config=LARGE)


# Pooling


def test_no_prompt_exceeds_its_limits() -> None:
    assert compress_ratio([2000] * 4, LARGE) == 1.0
    assert compress_ratio([2000] * 10, LARGE) == 20000 / 8000
    short = PixelConfig(max_tokens_video=8000, max_vision_length=3000)
    assert compress_ratio([2000] * 10, short) == 6.7  # 20000 / 3000, rounded up to tenths
    times = PixelConfig(omni_video_fix_post_pooling_times=4)
    assert compress_ratio([2000] * 10, times) == 4
    tokens = PixelConfig(max_tokens_video=20000, omni_video_fix_post_pooling_tokens=300)
    assert compress_ratio([2000] * 10, tokens) == 6.7
    for ratio in (1.5, 2.5, 6.7):
        h, w = pooled_grid((1, 48, 88), ratio, LARGE)
        assert h % 2 == w % 4 == 0  # also behind the halving of the width
        assert h * w // 2 <= 2112 / ratio


@pytest.mark.parametrize("kind", ["picture", "video"])
def test_what_follows_a_video_keeps_its_own_grids(kind: str) -> None:
    video = unit_grids(480, 640, num_frames=16, config=LARGE)
    after = unit_grids(3000, 4000, num_frames=1 if kind == "picture" else 4, config=LARGE)
    ratio, (first, second) = plan_pooling([video, after], LARGE)
    assert ratio > 1
    assert first == [pooled_grid(grid, ratio, LARGE) for grid in video]
    assert second == [pooled_grid(grid, ratio, LARGE) for grid in after]
    assert len(first) == 8
    assert second[0] != first[0]


def test_a_ratio_that_leaves_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="288 vision tokens, pooled by 200, keeps 1: take fewer"):
        pooled_grid((1, 24, 24), 200, LARGE)


# The config


def test_video_limits_default_to_those_of_a_picture() -> None:
    config = PixelConfig.from_dict({"min_tokens": 8, "max_tokens": 40}, source="config.json")
    assert (config.min_tokens_video_vit, config.max_tokens_video_vit) == (8, 40)
    assert (config.min_tokens_video, config.max_tokens_video) == (8, 40)
    values = {"max_tokens": 40, "max_tokens_video": 99, "min_tokens": 8, "hidden_size": 1}
    assert PixelConfig.from_dict(values, source="config.json").max_tokens_video == 99
    assert PixelConfig.from_dict({}, source="config.json") == PixelConfig()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"resolution_mode": "224"}, "config.json: resolution_mode=224: only native"),
        ({"relarge_ratio": 2}, "config.json: relarge_ratio=2: only 1"),
        ({"max_tokens": "many"}, "config.json: max_tokens='many': set a positive whole number"),
        ({"resize_factor": 0}, "config.json: resize_factor=0: set a positive"),
        ({"min_tokens": 50, "max_tokens": 40}, "min_tokens=50 is above max_tokens=40"),
        ({"image_mean": [0.5]}, "image_mean=.* set 3 values"),
    ],
)
def test_settings_that_cannot_work_are_errors(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PixelConfig.from_dict(values, source="config.json")
