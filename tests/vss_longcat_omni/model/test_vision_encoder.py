"""LongCat-ViT, projector and pooling: the official results, and each item by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.vss_longcat_omni.support.vision_reference import compare_vision
from vss_longcat_omni.media.pixels import PixelConfig, to_patches
from vss_longcat_omni.model.vision_encoder import (
    VisionConfig,
    VisionEncoder,
    VisionProjector,
    pool_features,
    rotary_angles,
)

REFERENCE = Path(__file__).parents[2] / "reference" / "longcat_omni_vision_tiny.cases.safetensors"
WEIGHTS = Path(str(REFERENCE).replace(".cases.", ".weights."))
TINY = VisionConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    adaptor_dim=32, proj_output_dim=24,
)  # fmt: skip
GRIDS = [(1, 4, 6), (1, 4, 6), (1, 4, 6), (1, 2, 12), (1, 6, 2)]


@pytest.fixture
def encoder() -> VisionEncoder:
    torch.manual_seed(0)
    encoder = VisionEncoder(TINY)
    for param in encoder.parameters():
        nn.init.normal_(param, std=0.2)
    return encoder


def make_patches(grids: list[Any], dim: int = TINY.patch_dim) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(t * h * w for t, h, w in grids), dim, generator=generator)


def gradients(encoder: VisionEncoder, patches: Tensor) -> list[Tensor]:
    encoder.zero_grad()
    encoder(patches, GRIDS).square().mean().backward()
    grads = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    assert len(grads) == len(list(encoder.parameters()))
    return grads


# The official model


def test_official_outputs_and_gradients() -> None:
    errors = dict(compare_vision(REFERENCE))
    with safe_open(REFERENCE, "pt") as file:
        inputs = {n for n in file.keys() if n.endswith(("pixel_values", "grid_shapes"))}  # noqa: SIM118
        outputs = (set(file.keys()) - inputs) | {"images.grad_pixel_values", "mlp_inner_dim"}
    assert set(errors) == outputs
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", ["clips.encoder_output", "images.rotary_pos_emb", "pool.output"])
def test_one_changed_number_is_found(tmp_path: Path, name: str) -> None:
    with safe_open(REFERENCE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(REFERENCE)
    flat = tensors[name].flatten()
    flat[flat.abs().argmax()] *= 1.001
    save_file(tensors, tmp_path / "a.cases.safetensors", metadata=metadata)
    (tmp_path / "a.weights.safetensors").write_bytes(WEIGHTS.read_bytes())
    errors = dict(compare_vision(tmp_path / "a.cases.safetensors"))
    assert [name for name, error in errors.items() if error > 1e-5] == [name]


def test_released_config_has_the_released_size() -> None:
    with torch.device("meta"):
        encoder = VisionEncoder(VisionConfig())
    assert VisionConfig().mlp_inner_dim == 3456
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == 637


def test_released_part_files_load_as_they_are(tmp_path: Path) -> None:
    with safe_open(WEIGHTS, "pt") as file:
        config = VisionConfig.from_dict(json.loads(file.metadata()["config"]), source="weights")
    weights = load_file(WEIGHTS)
    for prefix, module in (
        ("vision_encoder.", VisionEncoder(config)),
        ("vision_projector.", VisionProjector(config)),
    ):
        part = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        torch.save(part, tmp_path / "part.pt")
        module.load_state_dict(torch.load(tmp_path / "part.pt", weights_only=True))
        assert all(torch.equal(module.state_dict()[name], part[name]) for name in part)


# Packed items


def test_each_item_attends_to_itself_alone(encoder: VisionEncoder) -> None:
    patches = make_patches(GRIDS)
    packed = encoder(patches, GRIDS).split([24, 24, 24, 24, 12])
    for rows, grid, wanted in zip(patches.split([24, 24, 24, 24, 12]), GRIDS, packed, strict=True):
        torch.testing.assert_close(encoder(rows, [grid]), wanted, rtol=1e-4, atol=1e-4)
    changed = patches.clone()
    changed[24:48] += 1  # the second item
    other = encoder(changed, GRIDS)
    assert torch.equal(other[:24], packed[0])
    assert torch.equal(other[48:], torch.cat(packed[2:]))
    assert not torch.allclose(other[24:48], packed[1])


def test_the_units_of_a_video_are_one_product(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    attention = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append(tuple(q.shape))
        return attention(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    encoder(make_patches(GRIDS[:3]), GRIDS[:3])
    assert shapes == [(3, 4, 24, 16)] * TINY.num_hidden_layers


def test_positions_matter_and_are_the_same_in_every_frame() -> None:
    tall, wide, both = (
        rotary_angles(grids, TINY, torch.device("cpu"))
        for grids in ([(1, 6, 2)], [(1, 2, 6)], [(2, 6, 2)])
    )
    assert torch.equal(both, torch.cat((tall, tall)))
    assert not torch.equal(tall, wide)
    assert torch.equal(tall.view(6, 2, 8)[:, 0, :4], wide.view(2, 6, 8)[0, :, 4:])


def test_rows_above_256_are_distinct_in_bfloat16(encoder: VisionEncoder) -> None:
    grids = [(1, 300, 2)]
    patches = make_patches([(1, 1, 1)]).expand(600, -1)
    angles = rotary_angles(grids, encoder.bfloat16().config, torch.device("cpu"))
    assert angles.dtype == torch.float32
    assert len(angles.view(300, 2, -1)[:, 0, 0].unique()) == 300
    assert encoder(patches, grids).dtype == torch.bfloat16


# Training


def test_recomputed_gradients_are_the_same(encoder: VisionEncoder) -> None:
    patches = make_patches(GRIDS)
    plain = gradients(encoder, patches)
    calls = []
    encoder.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    encoder.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(encoder, patches), plain, rtol=0, atol=0)
    assert len(calls) == 2  # computed again for the backward pass


def test_nothing_is_read_back_from_the_device() -> None:
    with torch.device("meta"):
        encoder, projector = VisionEncoder(TINY), VisionProjector(TINY)
        features = projector(encoder(make_patches(GRIDS).to("meta"), GRIDS), GRIDS)
        pooled = pool_features(features, GRIDS, [(2, 4)] * 3 + [(2, 12), (6, 2)])
    assert pooled.shape == (3 * 4 + 12 + 6, TINY.proj_output_dim)


def test_the_whole_compiles_to_one_graph(encoder: VisionEncoder) -> None:
    patches = make_patches(GRIDS)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(patches, GRIDS), encoder(patches, GRIDS))


# Projector and pooling


def test_the_projector_joins_neighbors_of_a_row() -> None:
    projector = VisionProjector(TINY)
    features = torch.randn(24, 64)
    out = projector(features, [(1, 4, 6)])
    assert out.shape == (12, 24)
    changed = features.clone()
    changed[7] += torch.randn(64)  # row 1, column 1: the second of the fourth pair
    differs = (projector(changed, [(1, 4, 6)]) != out).any(-1)
    assert differs.nonzero().flatten().tolist() == [3]


def test_halving_both_sides_is_the_mean_of_four() -> None:
    features = torch.randn(2 * 4 * 8 + 6, 5, requires_grad=True)
    pooled = pool_features(features, [(1, 4, 16)] * 2 + [(1, 6, 2)], [(2, 8)] * 2 + [(6, 2)])
    maps = features[:64].view(2, 2, 2, 4, 2, 5).mean((2, 4)).flatten(0, 2)
    torch.testing.assert_close(pooled, torch.cat((maps, features[64:])))
    pooled.sum().backward()
    wanted = torch.tensor([0.25] * 64 + [1.0] * 6)[:, None].expand(-1, 5)
    torch.testing.assert_close(features.grad, wanted)


def test_a_clip_goes_from_pixels_to_the_width_of_the_language_model() -> None:
    pair = torch.randint(256, (2, 28, 56, 3), dtype=torch.uint8)
    patches, grids = to_patches(pair.repeat(2, 1, 1, 1), PixelConfig())
    features = VisionProjector(TINY)(VisionEncoder(TINY)(patches, grids), grids)
    assert features.shape == (8, TINY.proj_output_dim)
    torch.testing.assert_close(features[4:], features[:4])  # two units of equal frames


# Refusals


@pytest.mark.parametrize(
    ("shape", "grids", "problem"),
    [
        ((24, 1000), [(1, 4, 6)], r"\(24, 1000\): give \(N, 1176\)"),
        ((24, 1176), [(1, 4, 6), (1, 2, 2)], "24 patches for 2 grids of 28 in all"),
        ((0, 1176), [], "0 patches for 0 grids"),
    ],
)
def test_grids_that_do_not_fit_are_errors(
    encoder: VisionEncoder, shape: tuple[int, int], grids: list[Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        encoder(torch.zeros(shape), grids)


def test_the_projector_takes_single_units_only() -> None:
    for grid in [(2, 2, 4), (1, 4, 3)]:
        with pytest.raises(ValueError, match="takes t = 1 and an even width"):
            VisionProjector(TINY)(torch.zeros(16, 64), [grid])


def test_pooled_grids_belong_to_the_units() -> None:
    with pytest.raises(ValueError, match="8 vision tokens, 1 grids and 2 pooled grids do not"):
        pool_features(torch.zeros(8, 3), [(1, 4, 4)], [(2, 4), (2, 4)])
    with pytest.raises(ValueError, match="9 vision tokens, 1 grids"):
        pool_features(torch.zeros(9, 3), [(1, 4, 4)], [(2, 4)])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"hidden_act": "gelu"}, "config.json: hidden_act=gelu: only SwiGLU"),
        ({"pe_type": "learned"}, "config.json: pe_type=learned: only rope2d"),
        ({"hidden_size": 60, "num_attention_heads": 6}, "config.json: .* multiple of 4"),
        ({"hidden_size": "1280"}, "config.json: hidden_size='1280': set a whole number"),
    ],
)
def test_settings_that_cannot_work_are_errors(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        VisionConfig.from_dict(values, source="config.json")


def test_keys_of_other_modules_are_left_aside() -> None:
    values = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "min_tokens": 576,
        "use_flash_attn": True,
    }
    assert VisionConfig.from_dict(values, source="config.json").hidden_size == 64
