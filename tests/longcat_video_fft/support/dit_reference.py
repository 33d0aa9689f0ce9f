"""Rebuilds the cases of `longcat_video_dit_*` files: the transformer."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

INPUTS = {"latents", "text", "text_mask", "timestep"}


def compare_dit(path: Path) -> Iterator[tuple[str, float]]:
    """Returns (tensor name, largest relative error) for every output and gradient of a cases file.

    A case is a prefix: `t2v.`, `i2v.` (condition frames) or `no_zero_pad.` (the config's flag off).
    """
    cases, metadata = read_tensors(path)
    weights, _ = read_tensors(path.with_name(path.name.replace(".cases.", ".weights.")))
    config = json.loads(metadata["config"])
    compared = set(INPUTS)
    for case in sorted({name.partition(".")[0] for name in cases if "." in name}):
        model = build(weights, config | zero_padding(case, config))
        found = run_case(model, cases, case, num_cond_latents=condition_of(case, metadata))
        for name, value in found:
            compared.add(name)
            yield name, relative_error(value, cases[name])
        compared.add(f"{case}.timestep")
    left = set(cases) - compared
    if left:
        raise ValueError(f"tensors that nothing compares: {sorted(left)}")


def zero_padding(case: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"text_tokens_zero_pad": config["text_tokens_zero_pad"] and case != "no_zero_pad"}


def condition_of(case: str, metadata: dict[str, str]) -> int:
    """Reads `num_cond_latents` of the metadata, as "i2v: 1"; others have none."""
    found = re.search(rf"{case}\s*:\s*(\d+)", metadata.get("num_cond_latents", ""))
    return int(found.group(1)) if found else 0


def build(weights: dict[str, Tensor], config: dict[str, Any]) -> LongCatVideoTransformer3DModel:
    model = LongCatVideoTransformer3DModel(**config)
    model.load_state_dict(weights)
    return model


def run_case(
    model: LongCatVideoTransformer3DModel,
    cases: dict[str, Tensor],
    case: str,
    *,
    num_cond_latents: int,
) -> Iterator[tuple[str, Tensor]]:
    """Computes the output, and the gradients of mean(output^2) that the file holds."""
    latents = cases["latents"].clone().requires_grad_()
    output = model(
        latents,
        cases.get(f"{case}.timestep", cases["timestep"]),
        cases["text"],
        cases["text_mask"],
        num_cond_latents=num_cond_latents,
    )
    yield f"{case}.output", output.detach()
    wanted = sorted(name for name in cases if name.startswith(f"{case}.grad"))
    if not wanted:
        return
    output.pow(2).mean().backward()
    params = dict(model.named_parameters())
    for name in wanted:
        source = name.removeprefix(f"{case}.grad").lstrip("_.")
        grad = latents.grad if source == "latents" else params[source].grad
        assert grad is not None
        yield name, grad


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference over the largest entry."""
    if value.shape != wanted.shape:
        raise ValueError(f"shape {tuple(value.shape)} instead of {tuple(wanted.shape)}")
    return ((value - wanted).abs().max() / wanted.abs().max()).item()
