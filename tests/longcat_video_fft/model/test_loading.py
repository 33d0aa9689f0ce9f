"""Weights in and out: every shape of folder, what is wrong with it, and any number of processes."""

from __future__ import annotations

import json
import math
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from longcat_video_fft.model import loading
from longcat_video_fft.model.loading import (
    CheckpointReader,
    load_weights,
    save_transformer,
    verify_loaded,
)
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from tests.longcat_video_fft.support.small_engine import (
    SIZES,
    differing,
    make_engine,
    make_inputs,
    own_state,
    train_steps,
    whole_state,
)
from tests.longcat_video_fft.support.spawn import join_alone, spawn

if TYPE_CHECKING:
    from pathlib import Path


def make_model(*, seed: int = 0, device: str = "cpu", **options: Any) -> Any:
    with torch.device("meta"):
        model: Any = LongCatVideoTransformer3DModel(**{**SIZES, **options})
    if device != "meta":
        load_weights(model.to_empty(device=device), None, seed=seed, init="random")
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns the tiny model's dit/, in one file."""
    save_transformer(make_model(), tmp_path / "dit", dtype=torch.float32, is_main=True)
    return tmp_path / "dit"


def edit(folder: Path, change: Any) -> None:
    """Rewrites the weights after `change` of their dict."""
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def in_two_processes(folder: Path) -> None:
    """Checks initial values, a save in several files, and a read of one process's files."""
    engine = make_engine(optimizer="adamw", seed=5)
    state = whole_state(engine)
    if dist.get_rank() == 0:
        torch.save(state, folder / "start.pt")
    train_steps(engine, 0, 1)
    loading.MAX_SHARD_BYTES = 60_000
    is_main = dist.get_rank() == 0
    save_transformer(engine.module, folder / "saved", dtype=torch.float32, is_main=is_main)
    again = make_engine(optimizer="adamw", seed=6)
    load_weights(again.module, folder / "saved", seed=0)
    assert differing(weights(again), weights(engine)) == []

    load_weights(again.module, folder / "whole", seed=0)
    state = whole_state(again)
    expected = load_file(folder / "whole" / "diffusion_pytorch_model.safetensors")
    assert differing({name: state[name] for name in expected}, expected) == []

    # One process alone reads the bad row; all raise.
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.weight: .* NaN"):
        load_weights(again.module, folder / "bad", seed=0)


def weights(engine: Any) -> dict[str, torch.Tensor]:
    names = [name for name, _ in engine.module.named_parameters()]
    state = own_state(engine)
    return {name: state[name] for name in names}


def test_two_processes_read_and_write_as_one(tmp_path: Path) -> None:
    whole, bad = tmp_path / "whole", tmp_path / "bad"
    save_transformer(make_model(), whole, dtype=torch.float32, is_main=True)
    shutil.copytree(whole, bad)
    edit(bad, lambda t: t["blocks.1.attn.proj.weight"][-1].fill_(math.nan))
    spawn(in_two_processes, tmp_path)

    start = torch.load(tmp_path / "start.pt")
    ours = dict(make_model(seed=5).named_parameters())
    assert all(torch.equal(start[name], param) for name, param in ours.items())

    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    count = len(names) - 2
    assert count > 2
    assert names == [
        "config.json",
        *(f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)),
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    # Diffusers reads it as one of its own, though FSDP had renamed the class.
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["_class_name"] == "LongCatVideoTransformer3DModel"
    theirs = LongCatVideoTransformer3DModel.from_pretrained(tmp_path / "saved")
    model = make_model(device="meta").to_empty(device="cpu")
    load_weights(model, tmp_path / "saved", seed=0)
    assert differing(dict(theirs.state_dict()), model.state_dict()) == []
    assert dict(theirs.config)["depth"] == SIZES["depth"]


def test_save_casts_and_replaces(folder: Path) -> None:
    model = make_model(seed=3)
    (folder / "left").touch()
    save_transformer(model, folder, dtype=torch.bfloat16, is_main=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert not list(folder.parent.glob("*.partial"))
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    assert differing(stored, state) == []
    # And read into fp32 parameters.
    load_weights(model, folder, seed=0)
    assert model.x_embedder.proj.weight.dtype == torch.float32
    assert torch.equal(model.x_embedder.proj.weight, stored["x_embedder.proj.weight"].float())


def test_a_reader_gives_rows(folder: Path) -> None:
    reader = CheckpointReader(folder)
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    name = "blocks.0.ffn.w1.weight"
    assert name in reader
    assert reader.shape(name) == tuple(stored[name].shape)
    assert torch.equal(reader.rows(name, 3, 7), stored[name][3:7])


def rename(tensors: dict[str, Any]) -> None:
    tensors["blocks.0.ffn.w9.weight"] = tensors.pop("blocks.0.ffn.w1.weight")


def add(tensors: dict[str, Any]) -> None:
    tensors["lora.weight"] = torch.ones(2)


def reshape(tensors: dict[str, Any]) -> None:
    tensors["x_embedder.proj.bias"] = torch.ones(3)


def make_nan(tensors: dict[str, Any]) -> None:
    tensors["y_embedder.y_proj.0.bias"][1] = math.nan


def make_huge(tensors: dict[str, Any]) -> None:
    tensors["y_embedder.y_proj.0.bias"][1] = 1e6


def make_zero(tensors: dict[str, Any]) -> None:
    tensors["blocks.1.attn.qkv.weight"].zero_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"1 weights are missing: blocks\.0\.ffn\.w1\.weight\. The folder is incomplete"),
        (add, r"1 weights are unknown to the model: lora\.weight\."),
        (reshape, r"x_embedder\.proj\.bias has shape \(3,\), but config.json makes it \(32,\)"),
        (make_nan, r"y_embedder\.y_proj\.0\.bias: the weights hold NaN"),
        (make_huge, r"y_embedder\.y_proj\.0\.bias: a weight of size 1e\+06 is beyond"),
        (make_zero, r"blocks\.1\.attn\.qkv\.weight: all its weights are zero"),
    ],
)
def test_bad_weights_are_errors(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        load_weights(make_model(seed=9), folder, seed=0)


def test_bad_folders_are_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors file.*transformer_init"):
        CheckpointReader(folder.parent)
    path = folder / "diffusion_pytorch_model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(ValueError, match="damaged or cut short"):
        CheckpointReader(folder)
    index = {"weight_map": {"a": path.name, "b": "diffusion_pytorch_model-00002.safetensors"}}
    (folder / f"{path.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"1 of the 2 weight files .* missing, first .*-00002"):
        CheckpointReader(folder)


def test_meta_tensors_are_found() -> None:
    with pytest.raises(ValueError, match=r"never given memory, first x_embedder\.proj\.weight"):
        verify_loaded(make_model(device="meta"))


def test_initial_values() -> None:
    """Weights have Glorot's bounds and small last layers, and every weight learns at once."""
    model = make_model(hidden_size=64)
    params = dict(model.named_parameters())
    for name, value in params.items():
        if name.endswith("bias"):
            assert not value.any()
        elif value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value))
        else:
            fan_in, fan_out = value[0].numel(), len(value)
            deviation = math.sqrt(2 / (fan_in + fan_out))
            if "adaLN" in name or name == "final_layer.linear.weight":
                deviation = 0.2 / math.sqrt(fan_in)
            assert value.std().item() == pytest.approx(deviation, rel=0.1)
            assert abs(value.mean().item()) < 0.1 * deviation
            assert value.abs().max().item() <= math.sqrt(3) * deviation
    first, second = params["blocks.0.attn.proj.weight"], params["blocks.1.attn.proj.weight"]
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.1
    other = make_model(hidden_size=64, seed=1).blocks[0].attn.proj.weight
    assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.1
    model(*make_inputs(0)).square().mean().backward()
    assert all(param.grad is not None and param.grad.any() for param in params.values())


def test_initial_values_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_model().state_dict()
    monkeypatch.setattr(loading, "DRAW_CHUNK", 100)
    assert differing(make_model().state_dict(), expected) == []


def test_an_unknown_kind_of_parameter_is_no_guess() -> None:
    join_alone()
    model = torch.nn.Module()
    model.table = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="table: no rule"):
        load_weights(model, None, seed=0, init="random")
