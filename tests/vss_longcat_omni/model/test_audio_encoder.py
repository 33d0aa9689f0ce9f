"""The audio encoder: recorded official results, equal results in any batch, size, freezing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.vss_longcat_omni.support.audio_reference import (
    ALLOWED,
    build,
    compare_audio,
    read_tensors,
)
from vss_longcat_omni.media.fbank import FbankConfig
from vss_longcat_omni.model.audio_encoder import (
    AudioEncoder,
    AudioEncoderConfig,
    AudioProjector,
    valid_index,
)

REFERENCE = Path(__file__).parents[2] / "reference"
CASES = "longcat_omni_audio_tiny.cases.safetensors"
WEIGHTS = "longcat_omni_audio_tiny.weights.safetensors"
SIZES: dict[str, Any] = {
    "input_size": 10, "hidden_size": 24, "proj_size": 12, "vocab_size": 7, "nlayer": 4,
    "num_right_layers": 2, "left_order": 3, "right_order": 2, "dropout": 0.5,
}  # fmt: skip


def build_encoder(*, remask: bool = True, **changes: Any) -> AudioEncoder:
    """With large random weights, the norms' biases included: what leaks shows."""
    torch.manual_seed(0)
    encoder = AudioEncoder(AudioEncoderConfig(**SIZES | changes), remask=remask).eval()
    for param in encoder.parameters():
        torch.nn.init.normal_(param, std=0.4)
    return encoder


def change_cases(folder: Path, change: Any) -> Path:
    """Copies the reference files to `folder` with one case tensor changed."""
    tensors, metadata = read_tensors(REFERENCE / CASES)
    change(tensors)
    save_file(tensors, folder / CASES, metadata)
    shutil.copy(REFERENCE / WEIGHTS, folder)
    return folder / CASES


# Recorded official results.


def test_recorded_official_outputs_and_gradients_are_ours() -> None:
    errors = dict(compare_audio(REFERENCE / CASES))
    outputs = set(read_tensors(REFERENCE / CASES)[0]) - {"features", "lengths", "solo.row"}
    ours = {"solo.encoder_output.default", "solo.encoder_output.remask"}
    assert set(errors) == outputs | ours
    assert max(errors.values()) <= ALLOWED, errors


@pytest.mark.parametrize(
    "name", ["encoder_output", "logits", "adaptor_output", "grad_features", "solo.encoder_output"]
)
def test_one_changed_number_of_the_recording_is_found(tmp_path: Path, name: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[1] += 1e-3 * tensors[name].abs().max()

    errors = dict(compare_audio(change_cases(tmp_path, change)))
    assert {n for n, e in errors.items() if e > ALLOWED} >= {name}
    assert errors["projector_output"] <= ALLOWED


def test_a_recorded_tensor_that_nothing_compares_is_found(tmp_path: Path) -> None:
    path = change_cases(tmp_path, lambda tensors: tensors.update(extra=torch.ones(1)))
    with pytest.raises(ValueError, match=r"nothing compares: \['extra'\]"):
        list(compare_audio(path))


def test_the_recording_separates_the_official_batch_from_ours() -> None:
    """Its padded row differs from the same row alone in the last right layers' positions."""
    cases, _ = read_tensors(REFERENCE / CASES)
    size, last = int(cases["lengths"][0]), 2
    batch, alone = cases["encoder_output"][0, :size], cases["solo.encoder_output"][0]
    assert torch.equal(batch[:-last], alone[:-last])
    assert (batch[-last:] - alone[-last:]).abs().max() > 1e-3


# Batches.


@pytest.mark.parametrize("changes", [{}, {"left_stride": 2}, {"ndnn": 0, "activation": "relu2"}])
def test_a_clip_has_the_same_result_in_every_batch(changes: dict[str, Any]) -> None:
    encoder = build_encoder(**changes)
    features, lengths = torch.randn(3, 15, 10), torch.tensor([4, 15, 9])
    alone = [
        encoder(features[i : i + 1, :size], torch.tensor([size]))
        for i, size in enumerate(lengths.tolist())
    ]
    torch.testing.assert_close(encoder(features, lengths), torch.cat(alone))
    features[0, 4:] = 1e3  # what is beyond the end is not used
    torch.testing.assert_close(encoder(features, lengths), torch.cat(alone))
    official = build_encoder(remask=False, **changes)
    assert not torch.allclose(official(features, lengths), torch.cat(alone))
    same = torch.tensor([15, 15, 15])  # without padding both are the same
    torch.testing.assert_close(official(features, same), encoder(features, same))


def test_only_the_last_layers_use_what_is_to_come() -> None:
    """Two layers that look two positions ahead: a change shows four positions before it."""
    encoder = build_encoder()
    features = torch.randn(1, 30, 10)
    changed = features.clone()
    changed[:, 12] += 1
    length = torch.tensor([30])
    difference = (encoder(features, length) - encoder(changed, length)).abs().amax(1)
    reach = 4 * SIZES["left_order"]
    assert difference.nonzero().flatten().tolist() == list(range(8, 12 + reach + 1))


def test_valid_positions_are_taken_clip_after_clip() -> None:
    index = valid_index(torch.tensor([2, 0, 3]), 5, max_length=4)
    assert index.tolist() == [0, 1, 8, 9, 10]


def test_a_batch_without_sound_gives_no_embedding_and_a_graph() -> None:
    encoder = build_encoder()
    output = encoder(torch.randn(1, 3, 10), torch.tensor([0]))
    assert output.shape == (0, 24)
    output.sum().backward()
    assert all(param.grad is not None for param in encoder.parameters())


# Size, names, and what a trainer does with it.


def test_size_at_the_released_widths() -> None:
    """512.2M and the projector's 75.5M; the technical report says 0.6B."""
    with torch.device("meta"):
        config = AudioEncoderConfig()
        encoder, projector = AudioEncoder(config), AudioProjector(config.output_size, 6144)
        features, lengths = torch.empty(2, 25, config.input_size), torch.tensor([25, 13])
        # On the meta device any value that the host reads is an error.
        embeddings = projector(encoder(features, lengths, num_tokens=38))
    assert embeddings.shape == (38, 6144)
    assert config.input_size == FbankConfig().feature_dim
    count = {m: sum(p.numel() for p in m.parameters()) for m in (encoder, projector)}
    first = 1200 * 6144 + 6144 + 6144 * 1536
    layers = 22 * (4 * 1536 + 2 * 1536 * 6144 + 6144 + 1536) + (16 * 11 + 6 * 12) * 1536
    last = 1536 * 6144 + 6144 * 6144 + 2 * 6144 + 6144 * 5252 + 5252
    assert count == {encoder: first + layers + last, projector: 2 * (6144 * 6144 + 6144)}
    assert count == {encoder: 512_209_028, projector: 75_509_760}
    state = encoder.state_dict()
    kernels = [state[f"fsmn_layers.{i}.memory.weight"].shape[-1] for i in range(22)]
    assert kernels == [11] * 16 + [12] * 6


def test_part_files_load_without_a_map() -> None:
    """audio_encoder.pt and audio_projector.pt hold each module's names, without its prefix."""
    weights, metadata = read_tensors(REFERENCE / WEIGHTS)
    names = {"audio_encoder": set[str](), "audio_projector": set[str]()}
    for name in weights:
        part, _, own = name.partition(".")
        names[part].add(own)
    assert "fsmn_layers.0.memory.weight" in names["audio_encoder"]
    assert names["audio_projector"] == {"0.weight", "0.bias", "2.weight", "2.bias"}
    hearing = build(weights, json.loads(metadata["config"]), remask=True)
    for part, module in hearing.items():
        assert set(module.state_dict()) == names[part]


def test_a_trainable_head_has_zero_gradients_and_a_frozen_one_is_left_out() -> None:
    encoder = build_encoder()
    features, lengths = torch.randn(2, 6, 10), torch.tensor([6, 5])
    with_head = encoder(features, lengths)
    with_head.square().mean().backward()
    grads = {name: param.grad for name, param in encoder.named_parameters()}
    for name, is_zero in (("output.weight", True), ("output.bias", True), ("ffn.0.weight", False)):
        grad = grads[name]
        assert grad is not None
        assert bool((grad == 0).all()) is is_zero
    encoder.output.requires_grad_(False)
    calls = []
    encoder.output.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(encoder(features, lengths), with_head)
    assert not calls
    assert encoder.logits(with_head).shape == (11, 7)


def test_a_frozen_encoder_has_no_dropout() -> None:
    features, lengths = torch.randn(1, 6, 10), torch.tensor([6])
    encoder = build_encoder()
    expected = encoder(features, lengths)
    parent = torch.nn.ModuleList([encoder]).train()
    assert not torch.equal(encoder(features, lengths), expected)
    encoder.requires_grad_(False)
    parent.train()
    assert torch.equal(encoder(features, lengths), expected)
    assert not encoder(features, lengths).requires_grad


def test_it_is_one_graph_and_takes_features_in_float32_to_bf16() -> None:
    encoder = build_encoder(nlayer=2, num_right_layers=1).requires_grad_(False).to(torch.bfloat16)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    features, lengths = torch.randn(2, 6, 10), torch.tensor([6, 5])
    output = compiled(features, lengths, num_tokens=11)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, encoder(features, lengths))


# Bad inputs.


def test_features_of_another_width_are_errors() -> None:
    with pytest.raises(ValueError, match=r"\(1, 5, 80\): .* input_size=10\); 10 must be what"):
        build_encoder()(torch.zeros(1, 5, 80), torch.tensor([5]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nlayer": -1}, "nlayer=-1 must be a whole number of 0 or more"),
        ({"hidden_size": "6144"}, "hidden_size='6144' must be a whole number of 1 or more"),
        ({"activation": "gelu"}, "activation='gelu' must be one of relu6, relu2, relu"),
        ({"dropout": 1.5}, "dropout=1.5 must be in"),
        ({"layer_drop": 0.1}, "layer_drop=0.1 is not supported"),
    ],
)
def test_values_that_cannot_work_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"audio/config.json: {message}"):
        AudioEncoderConfig(**changes)


def test_other_keys_of_the_released_config_are_left_alone() -> None:
    values = {"nlayer": 3, "model_type": "longcat", "gradient_checkpointing": False}
    assert AudioEncoderConfig.from_dict(values) == AudioEncoderConfig(nlayer=3)
