"""The encoders against the libraries' own whole calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from transformers import UMT5EncoderModel

from longcat_video_fft.dataset.captions import clean_caption
from longcat_video_fft.model.text_encoder import TextEncoder, count_tokens, load_tokenizer
from longcat_video_fft.model.vae import load_video_encoder
from longcat_video_fft.options.buckets import MAX_TOKENS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.longcat_video_fft.support.tiny import Tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_frames", "chunk"), [(1, 4), (5, 4), (17, 4), (17, 8), (21, 12)])
def test_pieces_of_any_length_give_diffusers_latents(
    tiny: Tiny, num_frames: int, chunk: int
) -> None:
    frames = torch.randint(0, 256, (num_frames, 32, 48, 3), dtype=torch.uint8)
    encoder = load_video_encoder(tiny.model / "vae", CPU, dtype=torch.float32, chunk_frames=chunk)
    latents = encoder.encode(encoder.prepare(frames.numpy())).wait()
    vae = AutoencoderKLWan.from_pretrained(tiny.model / "vae").eval()
    video = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(video).latent_dist.mode()[0]  # pyright: ignore
    scale = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)  # pyright: ignore
    shift = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)  # pyright: ignore
    expected = (mean - shift) / scale
    assert latents.shape == (16, (num_frames - 1) // 4 + 1, 4, 6)
    assert latents.dtype == torch.bfloat16
    torch.testing.assert_close(latents.float(), expected, rtol=8e-3, atol=1e-3)  # bf16 rounds


def test_valid_tokens_are_those_of_the_official_call(tiny: Tiny) -> None:
    """The official call pads every caption to 512 tokens."""
    captions = ["A red circle moves left.", "", "x" * 700]
    tokenizer = load_tokenizer(tiny.model / "tokenizer")
    encoder = TextEncoder(tiny.model / "text_encoder", tokenizer, CPU)
    encoder.model = encoder.model.float()
    embeddings = encoder.encode(captions)
    assert [len(e) for e in embeddings] == [25, 1, MAX_TOKENS]
    assert count_tokens(tokenizer, captions) == [25, 1, 701]
    model = UMT5EncoderModel.from_pretrained(tiny.model / "text_encoder", dtype=torch.bfloat16)
    model = model.eval().float()  # pyright: ignore
    for caption, embedding in zip(captions, embeddings, strict=True):
        tokens = tokenizer(
            caption, padding="max_length", max_length=MAX_TOKENS, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            states = model(tokens.input_ids, attention_mask=tokens.attention_mask)
        expected = states.last_hidden_state[0, : len(embedding)]
        torch.testing.assert_close(embedding.float(), expected, rtol=8e-3, atol=2e-3)


def test_caption_rules_reach_the_encoder() -> None:
    assert clean_caption(" a &amp;amp; b\n\n  c ") == "a & b c"


def test_a_folder_without_the_part_is_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Wan VAE"):
        load_video_encoder(tmp_path, CPU, dtype=torch.float32, chunk_frames=4)
    with pytest.raises(ValueError, match="no UMT5 encoder"):
        TextEncoder(tmp_path, load_tokenizer(tiny.model / "tokenizer"), CPU)
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(tmp_path)
