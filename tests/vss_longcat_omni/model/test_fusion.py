"""Streams and features become one embedding a position; official: test_streams_reference.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vss_longcat_omni.dataset.special_tokens import SpecialTokens
from vss_longcat_omni.model.fusion import AudioEmbeddings, merge_embeddings

TOKENS = SpecialTokens()
H = 8
#               sound      text  pictures         sound, text, pads beside codes and not, a code
INPUT_IDS = [[136, 136, 10, 142, 142, 11, 3, 3], [136, 12, 142, 13, 3, 14, 3, 3]]
NO_CODE = [3, 3, 3, 3]


@pytest.fixture
def streams() -> tuple[Tensor, Tensor]:
    audio_ids = torch.full((2, 8, 4), 3)
    audio_ids[0, 5:7] = torch.tensor([[40, 3, 3, 3], [2, 41, 42, 43]])
    audio_ids[1, 4] = torch.tensor([44, 3, 3, 3])
    return torch.tensor(INPUT_IDS), audio_ids


@pytest.fixture
def tables() -> tuple[nn.Embedding, AudioEmbeddings]:
    torch.manual_seed(0)
    return nn.Embedding(150, H), AudioEmbeddings(64, H)


def merge(streams: Any, tables: Any, **features: Tensor) -> Tensor:
    (input_ids, audio_ids), (text, audio) = streams, tables
    embeds = text(input_ids), audio(audio_ids)
    return merge_embeddings(*embeds, input_ids, audio_ids, tokens=TOKENS, **features)


def make_features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    make = lambda: torch.randn(3, H, generator=generator).requires_grad_()  # noqa: E731
    return {"audio_features": make(), "image_features": make()}


def test_every_position_is_what_the_rules_say(streams: Any, tables: Any) -> None:
    features = make_features()
    sound, pictures = features["audio_features"], features["image_features"]
    text = tables[0].weight
    codes = [table.weight for table in tables[1].audio_embeddings]
    wanted = [
        [
            sound[0], sound[1], text[10], pictures[0], pictures[1],
            text[11] + codes[0][40],  # the acoustic PADs add nothing
            codes[0][2] + codes[1][41] + codes[2][42] + codes[3][43],  # nor does the text pad
            text[3],  # both streams are padding
        ],
        [sound[2], text[12], pictures[2], text[13], codes[0][44], text[14], text[3], text[3]],
    ]  # fmt: skip
    found = merge(streams, tables, **features)
    torch.testing.assert_close(found, torch.stack([torch.stack(row) for row in wanted]))


def test_a_packed_row_equals_the_padded_batch(streams: Any, tables: Any) -> None:
    features = make_features()
    packed = tuple(t.flatten(0, 1)[None] for t in streams)
    found = merge(packed, tables, **features)
    assert torch.equal(found[0], merge(streams, tables, **features).flatten(0, 1))


def test_features_and_used_table_rows_get_gradients(streams: Any, tables: Any) -> None:
    features = make_features()
    merge(streams, tables, **features).pow(2).sum().backward()
    for feature in features.values():
        assert torch.equal(feature.grad, 2 * feature.detach())  # pyright: ignore
    used = [{40, 2, 44}, {41}, {42}, {43}]
    for table, rows in zip(tables[1].audio_embeddings, used, strict=True):
        assert set(table.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == rows
    # Pads of sound and picture have an embedding of their own, which is not seen.
    learned = tables[0].weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert learned == [3, 10, 11, 12, 13, 14]


def test_without_features_the_pads_keep_their_embeddings(streams: Any, tables: Any) -> None:
    found = merge(streams, tables)
    assert torch.equal(found[0, 0], tables[0].weight[136])
    assert torch.equal(found[1, 2], tables[0].weight[142])
    some = merge(streams, tables, image_features=make_features()["image_features"])
    assert torch.equal(some[:, :2], found[:, :2])


def test_parameter_names_are_the_released_ones() -> None:
    names = list(AudioEmbeddings(64, H).state_dict())
    assert names == [f"audio_embeddings.{i}.weight" for i in range(4)]


def test_features_take_the_type_of_the_embeddings(streams: Any, tables: Any) -> None:
    half = tuple(table.bfloat16() for table in tables)
    features = make_features()
    found = merge(streams, half, **features)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0, 0], features["audio_features"][0].bfloat16())


@pytest.mark.parametrize("num_features", [2, 4])
def test_another_number_of_features_than_pads_is_an_error(
    streams: Any, tables: Any, num_features: int
) -> None:
    with pytest.raises(RuntimeError, match="as many image pads as image features"):
        merge(streams, tables, image_features=torch.randn(num_features, H))
    empty = merge(streams, tables, audio_features=torch.randn(3, H))
    assert empty.shape == (2, 8, H)


def test_no_value_is_read_back_from_the_device(streams: Any, tables: Any) -> None:
    """The meta device has no values: what needs one, such as a boolean index, fails there."""
    on_meta = tuple(t.to("meta") for t in streams)
    modules = tuple(table.to("meta") for table in tables)
    features = {name: value.to("meta") for name, value in make_features().items()}
    assert merge(on_meta, modules, **features).shape == (2, 8, H)


@pytest.mark.long  # seconds to import the compiler
def test_it_compiles_as_one_graph(streams: Any, tables: Any) -> None:
    features = make_features()
    compiled = torch.compile(merge, fullgraph=True, backend="eager")
    found = compiled(streams, tables, **features)
    assert torch.equal(found, merge(streams, tables, **features))
