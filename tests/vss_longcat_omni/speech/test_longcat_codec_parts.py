"""Parts of LongCat-Audio-Codec by hand, by torch and torchaudio: codebooks, layers, features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchaudio.compliance import kaldi

from tests.vss_longcat_omni.support.longcat_codec_samples import QUANTIZER
from vss_longcat_omni.speech.longcat_codec.features import Cmvn, compute_fbank
from vss_longcat_omni.speech.longcat_codec.layers import (
    NormedConv1d,
    NormedConvTranspose1d,
    Snake1d,
    nearest,
)
from vss_longcat_omni.speech.longcat_codec.quantizer import ResidualQuantizer, nearest_angle


def test_an_acoustic_code_is_a_pair_of_entries() -> None:
    quantizer = ResidualQuantizer(QUANTIZER)
    codes = torch.randint(49, (2, 3, 5))
    found = quantizer.embed(codes)
    wanted = torch.zeros(2, 8, 5)
    for codebook, part in zip(quantizer._codebooks(), codes.unbind(1), strict=True):
        a, b = codebook.codebook_a.weight[part // 7], codebook.codebook_b.weight[part % 7]
        halves = codebook.out_proj_a(a.transpose(1, 2)), codebook.out_proj_b(b.transpose(1, 2))
        wanted = wanted + torch.cat(halves, dim=1)
    torch.testing.assert_close(found, wanted)
    (first,) = quantizer.embed(codes[:, :1]).unsqueeze(0)
    torch.testing.assert_close(first, quantizer._codebooks()[0].embed(codes[:, 0]))


def test_codes_come_back_from_their_vectors() -> None:
    """Where the projections undo each other; and each codebook codes what the last one left."""
    quantizer = ResidualQuantizer(QUANTIZER)
    codebook = quantizer._codebooks()[0]
    with torch.no_grad():
        for half, side in enumerate("ab"):
            up, down = getattr(codebook, f"out_proj_{side}"), getattr(codebook, f"in_proj_{side}")
            up.bias.zero_()
            down.bias.zero_()
            weight = torch.zeros(4, 8, 1)
            joined = up.weight_v * up.weight_g / up.weight_v.norm(dim=(1, 2), keepdim=True)
            weight[:, 4 * half : 4 * half + 4] = torch.linalg.inv(joined[..., 0])[..., None]
            down.weight_v.copy_(weight)
            down.weight_g.copy_(weight.norm(dim=(1, 2), keepdim=True))
    codes = torch.arange(49)[None]
    vectors = codebook.embed(codes)
    assert torch.equal(codebook.encode(vectors), codes)
    assert torch.equal(codebook.encode(3 * vectors), codes)  # the angle alone decides
    rest = vectors + torch.randn(1, 8, 49)
    found = quantizer.encode(rest)
    second = quantizer._codebooks()[1].encode(rest - codebook.embed(found[:, 0]))
    assert torch.equal(found[:, 1], second)


def test_nearest_is_the_least_distance() -> None:
    vectors, entries = torch.randn(2, 50, 6), torch.randn(30, 6)
    assert torch.equal(nearest(vectors, entries), torch.cdist(vectors, entries).argmin(-1))
    angles = nn.functional.cosine_similarity(vectors[:, :, None], entries, dim=-1)
    assert torch.equal(nearest_angle(vectors.transpose(1, 2), entries), angles.argmax(-1))


def test_normed_convolutions_are_those_of_torch() -> None:
    x = torch.randn(2, 6, 20)
    pairs = [
        (NormedConv1d(6, 4, 4, stride=2, padding=3), nn.Conv1d(6, 4, 4, 2, padding=3)),
        (NormedConv1d(6, 4, 7, dilation=3, padding=9), nn.Conv1d(6, 4, 7, dilation=3, padding=9)),
        (
            NormedConvTranspose1d(6, 4, 10, stride=5, padding=3, output_padding=1),
            nn.ConvTranspose1d(6, 4, 10, 5, padding=3, output_padding=1),
        ),
    ]
    for ours, plain in pairs:
        theirs = nn.utils.parametrizations.weight_norm(plain)
        theirs.load_state_dict(ours.state_dict())  # torch still reads weight_g and weight_v
        torch.testing.assert_close(ours(x), theirs(x))


def test_snake_by_hand() -> None:
    snake = Snake1d(2)
    snake.alpha.data = torch.tensor([1.0, 3.0]).view(1, 2, 1)
    found = snake(torch.tensor([[[0.5], [0.5]]]))[0, :, 0].tolist()
    assert found == pytest.approx([0.5 + math.sin(0.5) ** 2, 0.5 + math.sin(1.5) ** 2 / 3])
    assert (snake(torch.zeros(1, 2, 3)) == 0).all()


def test_fbank_is_that_of_kaldi() -> None:
    waveform = 32767 * (0.1 * torch.randn(16_000))
    wanted = kaldi.fbank(
        waveform[None], num_mel_bins=80, low_freq=40, high_freq=-200, preemphasis_coefficient=0.97,
        remove_dc_offset=False, window_type="povey", dither=0.0, energy_floor=0.0,
    )  # fmt: skip
    found = compute_fbank(waveform[None], 80)[0]
    assert found.shape == (98, 80)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_cmvn_by_hand() -> None:
    frames = np.random.default_rng(0).normal(5, [1, 2, 3], (100, 3))
    stats = np.stack([np.append(frames.sum(0), 100), np.append((frames**2).sum(0), 0)])
    cmvn = Cmvn(3)
    cmvn.set_statistics(stats)
    normed = cmvn(torch.from_numpy(frames).float())
    torch.testing.assert_close(normed.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(normed.std(0, correction=0), torch.ones(3), rtol=1e-4, atol=0)
