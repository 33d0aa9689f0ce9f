"""tools/make_model.py: the released layout, words that stay apart, the released shape, messages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from data.shapes import COLORS, DIRECTIONS, SHAPES, scene_of
from longcat_video_fft.model.loading import build_transformer
from longcat_video_fft.model.text_encoder import TextEncoder, load_tokenizer
from longcat_video_fft.tools import make_model
from tests.demos.longcat_video_fft import small_vae

if TYPE_CHECKING:
    from pathlib import Path

CAPTIONS = [scene_of(0, index).caption for index in range(300)]
PARTS = ["dit", "scheduler", "text_encoder", "tokenizer", "vae"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "captions" / "sub").mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        (folder / "captions" / "sub" / f"{number}.txt").write_text(caption)
    small_vae.save(small_vae.build_vae(4, 1), folder / "vae")
    argv = ["--size", "small", "--captions", str(folder / "captions")]
    assert make_model.main([str(folder / "model"), *argv, "--vae", str(folder / "vae")]) == 0
    return folder / "model"


def test_the_layout(model: Path) -> None:
    assert sorted(path.name for path in model.iterdir()) == PARTS
    transformer = build_transformer(model / "dit")
    count = sum(p.numel() for p in transformer.parameters())
    assert 50e6 < count < 100e6
    assert transformer.config["text_tokens_zero_pad"] is True


def test_a_usual_word_is_one_token_and_any_text_is_distinct(model: Path) -> None:
    tokenizer = load_tokenizer(model / "tokenizer")
    for word in [*COLORS, *SHAPES, *list(DIRECTIONS)[:4]]:
        assert len(tokenizer(f"a {word}")["input_ids"]) == 3, word  # a, the word, the end
    assert max(len(tokenizer(text)["input_ids"]) for text in CAPTIONS) <= 16
    odd = "Grüße 猫"
    assert tokenizer.decode(tokenizer(odd)["input_ids"], skip_special_tokens=True).strip() == odd


def test_words_are_far_apart_and_alike_in_any_company(model: Path) -> None:
    tokenizer = load_tokenizer(model / "tokenizer")
    encoder = TextEncoder(model / "text_encoder", tokenizer, torch.device("cpu"))

    def states_of(text: str) -> torch.Tensor:
        return encoder.encode([text])[0].float()

    one = states_of("A red circle moves left over a black background.")
    other = states_of("A red circle moves right over a black background.")
    alike = F.cosine_similarity(one, other, dim=-1)
    assert alike[4] < 0.5  # the word that differs
    assert alike[[1, 2, 8]].min() > 0.8  # red, circle, background
    moved = states_of("On a white background, a pink ring moves left.")
    alike = F.cosine_similarity(one[4], moved, dim=-1)
    assert alike.argmax() == 9  # left, in another company
    assert alike[9] > 0.6 > 0.5 > alike[:9].max()


def test_the_same_seed_gives_the_same_weights(model: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        shape = make_model.SIZES["small"][1]
        vocabulary = json.loads((model / "text_encoder" / "config.json").read_text())["vocab_size"]
        make_model.write_text_encoder(tmp_path / str(seed), shape, vocabulary=vocabulary, seed=seed)
    made, same, other = (
        (folder / "model.safetensors").read_bytes()
        for folder in (model / "text_encoder", tmp_path / "0", tmp_path / "1")
    )
    assert made == same
    assert made != other


def test_the_released_shape(tmp_path: Path) -> None:
    transformer, text = make_model.SIZES["released"]
    make_model.write_transformer_config(tmp_path / "dit", transformer, captions_dim=text["d_model"])
    model = build_transformer(tmp_path / "dit")
    assert sum(p.numel() for p in model.parameters()) == 13_581_071_424


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--captions", "."], "vae is needed with --size small"),
        (["--captions", ".", "--vae", "nowhere"], "vae=nowhere: has no config.json"),
        (["--captions", "nowhere", "--vae", "{vae}"], "captions=nowhere: holds no .txt file"),
    ],
)
def test_messages(
    model: Path, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [argument.format(vae=model / "vae") for argument in argv]
    assert make_model.main([str(tmp_path / "m"), "--size", "small", *argv]) == 1
    assert message in capsys.readouterr().err
