"""Rebuilds the cases of `llama_omni_speech_*` files: speech generator and projector."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from llama_omni.model.speech_generator import SpeechGeneratorCTC, collapse_path
from llama_omni.model.speech_projector import EncoderProjectorConcat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor


def compare_speech(path: Path) -> Iterator[tuple[str, float]]:
    """(tensor name, largest relative error) for every output and gradient of a cases file."""
    cases, values = read_tensors(path)
    weights, _ = read_tensors(path.with_name(path.name.replace(".cases.", ".weights.")))
    config = SimpleNamespace(**values)
    compared: set[str] = set()
    if "hidden" in cases:
        generator = load(SpeechGeneratorCTC(config), weights, "speech_generator.")
        for name, error in compare_generator(generator, cases):
            compared.add(name)
            yield name, error
    if "projector.in" in cases:
        projector = load(EncoderProjectorConcat(config), weights, "speech_projector.")
        compared.add("projector.out")
        yield (
            "projector.out",
            relative_error(projector(cases["projector.in"]), cases["projector.out"]),
        )
    inputs = {"hidden", "labels", "units", "projector.in"}
    left = set(cases) - compared - inputs
    if left:
        raise ValueError(f"tensors that nothing compares: {sorted(left)}")


def compare_generator(
    generator: SpeechGeneratorCTC, cases: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    hidden = cases["hidden"].clone().requires_grad_()
    loss = generator(hidden, cases["labels"], cases["units"], shift=False)
    loss.backward()
    yield "loss", relative_error(loss.reshape(1), cases["loss"])
    assert hidden.grad is not None
    yield "grad_hidden", relative_error(hidden.grad, cases["grad_hidden"])
    params = dict(generator.named_parameters())
    for name in sorted(name for name in cases if name.startswith("grad.")):
        param = params[name.removeprefix("grad.").removeprefix("speech_generator.")]
        assert param.grad is not None
        yield name, relative_error(param.grad, cases[name])
    if "predict.path" in cases:
        is_answer = cases["labels"][0] != -100
        path = generator.predict(cases["hidden"][0][is_answer])
        yield "predict.path", exact_error(path, cases["predict.path"])
        units = collapse_path(path[0].tolist(), blank=generator.blank)
        yield "predict.units", 0.0 if units == cases["predict.units"].tolist() else float("inf")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


def load(module: Any, weights: dict[str, Tensor], prefix: str) -> Any:
    """Strict: every parameter must be in the file under its official name, and no other."""
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    module.load_state_dict(own, strict=True)
    return module


def relative_error(ours: Tensor, official: Tensor) -> float:
    if ours.shape != official.shape:
        return float("inf")
    scale = official.abs().max().clamp(min=1e-30)
    error = (ours.detach() - official).abs().max() / scale
    return float(error) if error == error else float("inf")  # NaN is a mismatch


def exact_error(ours: Tensor, official: Tensor) -> float:
    is_equal = ours.shape == official.shape and bool((ours == official).all())
    return 0.0 if is_equal else float("inf")
