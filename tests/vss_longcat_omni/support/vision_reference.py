"""Rebuilds the cases of `longcat_omni_vision_*`, `_pixels_*` and `_geometry_*` files."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from vss_longcat_omni.media.pixels import (
    PixelConfig,
    num_tokens,
    num_units,
    plan_pooling,
    pooled_grid,
    resize_frames,
    resized_size,
    to_patches,
    unit_grids,
)
from vss_longcat_omni.model.vision_encoder import (
    VisionConfig,
    VisionEncoder,
    VisionProjector,
    pool_features,
    rotary_angles,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from vss_longcat_omni.media.pixels import Grid

MAX_VISION_LENGTH = 28672  # the official demo's, where a conversation sets none


# Encoder, projector and pooling


def compare_vision(path: Path) -> Iterator[tuple[str, float]]:
    """(tensor name, largest relative error) for every output and gradient of a cases file.

    A case is a prefix with `pixel_values`; `pool.` shrinks what the projector makes of `images.`.
    """
    cases, metadata = read_tensors(path)
    weights, _ = read_tensors(path.with_name(path.name.replace(".cases.", ".weights.")))
    config = VisionConfig.from_dict(json.loads(metadata["config"]), source=path.name)
    model = build(weights, config)
    if "mlp_inner_dim" in metadata:
        yield exact("mlp_inner_dim", config.mlp_inner_dim, int(metadata["mlp_inner_dim"]))
    compared = set()
    for case in [n.partition(".")[0] for n in cases if n.endswith(".pixel_values")]:
        compared |= {f"{case}.pixel_values", f"{case}.grid_shapes"}
        for name, value in run_case(model, cases, case).items():
            if name in cases:
                compared.add(name)
                yield name, relative_error(value, cases[name])
    if "pool.output" in cases:
        targets = cases["pool.resized_grid_shapes"].tolist()
        grids = cases["images.grid_shapes"].tolist()
        pooled = pool_features(cases["images.projector_output"], grids, targets)
        compared |= {"pool.output", "pool.resized_grid_shapes"}
        yield "pool.output", relative_error(pooled, cases["pool.output"])
    raise_for_rest(cases, compared)


def build(weights: dict[str, Tensor], config: VisionConfig) -> nn.ModuleDict:
    parts = {"vision_encoder": VisionEncoder(config), "vision_projector": VisionProjector(config)}
    model = nn.ModuleDict(parts)
    model.load_state_dict(weights)
    return model


def run_case(model: nn.ModuleDict, cases: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    """All results of a case by their names; gradients are those of mean(projector_output^2)."""
    grids = cases[f"{case}.grid_shapes"].tolist()
    pixel_values = cases[f"{case}.pixel_values"].clone().requires_grad_()
    encoder = model["vision_encoder"]
    encoded = encoder(pixel_values, grids)
    found = {
        f"{case}.encoder_output": encoded.detach(),
        f"{case}.rotary_pos_emb": rotary_angles(grids, encoder.config, encoded.device),  # pyright: ignore
    }
    if f"{case}.projector_output" in cases:
        projected = model["vision_projector"](encoded, grids)
        found[f"{case}.projector_output"] = projected.detach()
        model.zero_grad()
        projected.pow(2).mean().backward()
        assert pixel_values.grad is not None
        found[f"{case}.grad_pixel_values"] = pixel_values.grad
        for name, param in model.named_parameters():
            assert param.grad is not None
            found[f"{case}.grad.{name}"] = param.grad
    return found


# Pixels


def compare_pixels(path: Path) -> Iterator[tuple[str, float]]:
    """(tensor name, error) of each picture, of all pictures as one batch (`images.`) and of clips.

    Pixels relative to the largest, grids exactly.
    """
    cases, metadata = read_tensors(path)
    config = PixelConfig.from_dict(json.loads(metadata["config"]), source=path.name)
    compared, batch, batch_grids = set(), [], []
    for source in sorted((n for n in cases if ".uint8_" in n), key=lambda n: (len(n), n)):
        case = source.partition(".")[0]
        rows, grids = to_patches(resize_frames(cases[source].to(torch.uint8), config), config)
        compared.add(source)
        if source.endswith("_hwc"):
            batch.append(rows)
            batch_grids += grids
            compared.add(f"{case}.transformed")
            error = relative_error(
                first_frame(rows, grids[0], config), cases[f"{case}.transformed"]
            )
            yield f"{case}.transformed", error
        else:
            compared |= {f"{case}.pixel_values", f"{case}.grid_shapes"}
            yield from compare_patches(cases, case, rows, grids)
    if batch:
        compared |= {"images.pixel_values", "images.grid_shapes"}
        yield from compare_patches(cases, "images", torch.cat(batch), batch_grids)
    raise_for_rest(cases, compared)


def compare_patches(
    cases: dict[str, Tensor], case: str, rows: Tensor, grids: list[Grid]
) -> Iterator[tuple[str, float]]:
    yield f"{case}.pixel_values", relative_error(rows, cases[f"{case}.pixel_values"])
    wanted = [tuple(grid) for grid in cases[f"{case}.grid_shapes"].tolist()]
    yield exact(f"{case}.grid_shapes", grids, wanted)


def first_frame(rows: Tensor, grid: Grid, config: PixelConfig) -> Tensor:
    """The first frame of a unit back from its patches, (1, 3, H, W)."""
    _, h, w = grid
    patch = config.patch_size
    frame = rows.view(h, w, 3, 2, patch, patch)[:, :, :, 0]
    return frame.permute(2, 0, 3, 1, 4).reshape(1, 3, h * patch, w * patch)


# Geometry


def compare_geometry(path: Path) -> Iterator[tuple[str, float]]:
    """(case, 0.0 where every integer agrees, else infinity and the first difference)."""
    content = json.loads(path.read_text())
    config = content["config"]
    left = set(content) - {"config", "note", "images", "videos", "pooling", "conversations"}
    if left:
        raise ValueError(f"entries that nothing compares: {sorted(left)}")
    for case in content.get("images", []):
        yield compare_size(case, PixelConfig.from_dict(config, source=path.name))
    for case in content.get("videos", []):
        yield compare_size(case, PixelConfig.from_dict(config, source=path.name))
    for index, case in enumerate(content.get("pooling", [])):
        yield compare_pooling(f"pooling.{index}", case, config)
    for case in content.get("conversations", []):
        yield compare_conversation(case, config)


def compare_size(case: dict[str, Any], config: PixelConfig) -> tuple[str, float]:
    """A picture, or a video where the case has frames."""
    height, width, frames = case["height"], case["width"], case.get("frames", 1)
    rows, columns = resized_size(height, width, num_frames=frames, config=config)
    grid, *_ = unit_grids(height, width, num_frames=frames, config=config)
    found = {
        "height": height,
        "width": width,
        "resized_height": rows,
        "resized_width": columns,
        "grid": list(grid),
    }
    if "frames" in case:
        found |= {"frames": frames, "units": num_units(frames), "tokens_per_unit": num_tokens(grid)}
        return exact(f"videos.{width}x{height}x{frames}", found, case)
    return exact(f"images.{width}x{height}", found | {"tokens": num_tokens(grid)}, case)


def compare_pooling(name: str, case: dict[str, Any], config: dict[str, Any]) -> tuple[str, float]:
    limits = {key: case[key] for key in ("min_tokens_video", "max_tokens_video")}
    chosen = PixelConfig.from_dict(config | limits, source=name)
    grids = [tuple(grid) for grid in case["grids"]]
    pooled = [pooled_grid(grid, case["compress_ratio"], chosen) for grid in grids]
    found = limits | {
        "grids": case["grids"],
        "tokens": [num_tokens(grid) for grid in grids],
        "compress_ratio": case["compress_ratio"],
        "resized_grids": [list(grid) for grid in pooled],
        "resized_tokens": [h * w // 2 for h, w in pooled],
    }
    return exact(name, found, case)


def compare_conversation(case: dict[str, Any], config: dict[str, Any]) -> tuple[str, float]:
    name = f"conversations.{case['name']}"
    values = {"max_vision_length": MAX_VISION_LENGTH} | config | case["vision_overrides"]
    chosen = PixelConfig.from_dict(values | case["overrides"], source=name)
    items = []
    for item in case["items"]:
        if item["type"] == "image" and item["frames"] != 1:
            raise ValueError(f"{name}: an image of {item['frames']} frames")
        size = (item["height"], item["width"])
        items.append(unit_grids(*size, num_frames=item["frames"], config=chosen))
    ratio, pooled = plan_pooling(items, chosen)
    if math.isclose(
        ratio, case["compress_ratio"], rel_tol=1e-6
    ):  # the one value that is no integer
        ratio = case["compress_ratio"]
    found = {key: case[key] for key in ("name", "items", "vision_overrides", "overrides")} | {
        "compress_ratio": ratio,
        "token_nums": [[h * w // 2 for h, w in grids] for grids in pooled],
        "grids": [[list(grid) for grid in grids] for grids in pooled],
    }
    return exact(name, found, case)


# Shared


def exact(name: str, found: Any, wanted: Any) -> tuple[str, float]:
    """(name, 0.0), or infinity behind a name that has the first difference."""
    if found == wanted:
        return name, 0.0
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *found]:
            if found.get(key) != wanted.get(key):
                return exact(f"{name}.{key}", found.get(key), wanted.get(key))
    return f"{name} is {found}, not {wanted}", float("inf")


def raise_for_rest(cases: dict[str, Tensor], compared: set[str]) -> None:
    left = set(cases) - compared
    if left:
        raise ValueError(f"tensors that nothing compares: {sorted(left)}")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest entry."""
    if value.shape != wanted.shape:
        raise ValueError(f"shape {tuple(value.shape)} instead of {tuple(wanted.shape)}")
    return ((value - wanted).abs().max() / wanted.abs().max()).item()
