"""Weights in and out: the released layout, stretches as ZeRO keeps them, and bad folders."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vss_longcat_omni.support.tiny import AUDIO, VISION, randomize, tiny_config
from vss_longcat_omni.model.loading import CheckpointReader, _copy_pieces, load_config, load_weights
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.model.saving import save_config, save_weights

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def model() -> LongcatOmniForCausalLM:
    model = LongcatOmniForCausalLM(tiny_config(vision_config=VISION, audio_config=AUDIO))
    randomize(model)
    return model


@pytest.fixture
def folder(model: LongcatOmniForCausalLM, tmp_path: Path) -> Path:
    save_config(model.config, tmp_path)
    save_weights(model.state_dict(), tmp_path)
    return tmp_path


def fresh(folder: Path) -> LongcatOmniForCausalLM:
    return LongcatOmniForCausalLM(load_config(folder))


def test_what_is_saved_is_loaded(model: LongcatOmniForCausalLM, folder: Path) -> None:
    loaded = fresh(folder)
    load_weights(loaded, CheckpointReader(folder), show_progress=False)
    state = model.state_dict()
    assert set(state) == set(loaded.state_dict())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_layout_is_the_released_one(folder: Path) -> None:
    shard = load_file(folder / "model-00001-of-00001.safetensors")
    assert shard[f"{EXPERTS}.5.gate_proj.weight"].shape == (16, 32)
    assert shard[f"{EXPERTS}.5.down_proj.weight"].shape == (32, 16)
    assert "model.layers.1.mlp.router.e_score_correction_bias" in shard
    assert not any("gate_up" in name or name.startswith("vision") for name in shard)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(shard)
    heads = load_file(folder / "audio" / "audio_output_layers.safetensors")
    wanted = {f"audio_output_layers.{i}.weight" for i in range(4)}
    assert set(heads) == wanted | {f"embedding.{i}.weight" for i in range(3)}


def test_released_pickles_of_tensors_are_read(folder: Path, model: LongcatOmniForCausalLM) -> None:
    for path in [*folder.glob("audio/*.safetensors"), *folder.glob("vision/*.safetensors")]:
        torch.save(load_file(path), path.with_suffix(".pt"))
        path.unlink()
    name = "model.embed_tokens.weight"  # its own file counts where no shard has it
    shard = folder / "model-00001-of-00001.safetensors"
    state = load_file(shard)
    embedding = {"word_embeddings.weight": state.pop(name)}
    torch.save(embedding, folder / "language_model_embedding.pt")
    save_file(state, shard)
    loaded = fresh(folder)
    load_weights(loaded, CheckpointReader(folder), show_progress=False)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_a_pickle_of_anything_else_is_an_error(folder: Path) -> None:
    (folder / "audio" / "audio_encoder.safetensors").unlink()
    torch.save({"weight": print}, folder / "audio" / "audio_encoder.pt")
    with pytest.raises(ValueError, match=r"audio_encoder\.pt: not readable as a state dict"):
        CheckpointReader(folder)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
@pytest.mark.parametrize("name", [f"{EXPERTS}.gate_up_proj", "model.norm.weight"])
def test_each_process_reads_its_stretch(
    model: LongcatOmniForCausalLM, folder: Path, name: str, num_processes: int
) -> None:
    """As ZeRO divides: equal parts of the flattened tensor, the last one padded with zeros."""
    tensor = model.state_dict()[name]
    pieces = CheckpointReader(folder).find(name, tuple(tensor.shape))
    assert pieces is not None
    size = math.ceil(tensor.numel() / num_processes)
    parts = []
    for rank in range(num_processes):
        part = torch.full((size,), float("nan"))
        _copy_pieces(part, pieces, rank * size, tensor.numel())
        parts.append(part)
    whole = torch.cat(parts)
    assert torch.equal(whole[: tensor.numel()], tensor.flatten())
    assert not whole[tensor.numel() :].any()


def test_missing_tensors_are_reported(folder: Path) -> None:
    shard = folder / "model-00001-of-00001.safetensors"
    state = load_file(shard)
    del state[f"{EXPERTS}.3.up_proj.weight"]
    save_file(state, shard)
    with pytest.raises(ValueError, match=rf"1 tensors are missing, first {EXPERTS}\.gate_up_proj"):
        load_weights(fresh(folder), CheckpointReader(folder), show_progress=False)


def test_another_shape_is_reported(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ffn_hidden_size": 40}))
    with pytest.raises(
        ValueError, match=r"has shape \(48, 32\), but config.json makes it \(40, 32"
    ):
        load_weights(fresh(folder), CheckpointReader(folder), show_progress=False)


def test_values_that_are_no_numbers_are_reported(folder: Path) -> None:
    shard = folder / "model-00001-of-00001.safetensors"
    state = load_file(shard)
    state["model.norm.weight"][3] = float("nan")
    save_file(state, shard)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinite values"):
        load_weights(fresh(folder), CheckpointReader(folder), show_progress=False)


def test_a_folder_of_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"no \*\.safetensors file"):
        CheckpointReader(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not readable as JSON"):
        load_config(tmp_path)
