"""Noise, timesteps, condition frames, caption dropout, loss: their numbers, and that they are pure.

That the direction is the one that the official sampler needs: test_sign.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from longcat_video_fft.dataset.latents import Batch
from longcat_video_fft.dataset.sampler import BLOCK
from longcat_video_fft.model.flow_matching import (
    Noised,
    apply_caption_dropout,
    draw_num_cond_latents,
    hash_key,
    prepare,
    shift_sigma,
)
from longcat_video_fft.model.loss import sample_losses
from longcat_video_fft.options.buckets import Bucket
from longcat_video_fft.options.config import TrainConfig

CPU = torch.device("cpu")
IMAGE = {"image_to_video_probability": 1.0}
CONTINUATION = {"continuation_probability": 1.0}


def make_batch(
    *, rows: int = 3, frames: int = 6, height: int = 4, width: int = 6, position: int = 7
) -> Batch:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(rows, 16, frames, height, width, generator=generator).bfloat16()
    return Batch(
        names=[f"{row}.mp4" for row in range(rows)],
        bucket=Bucket(4 * frames - 3, 8 * height, 8 * width),
        latents=latents,
        caption_embeds=torch.randn(rows, 5, 8, generator=generator).bfloat16(),
        caption_mask=torch.arange(5)[None] < torch.arange(1, rows + 1)[:, None],
        position=position,
    )


def noised(batch: Batch, **options: Any) -> Noised:
    return prepare(batch, TrainConfig(**options), CPU)


def many(count: int, **options: Any) -> Noised:
    """Draws `count` samples of one micro-batch, as small as can be."""
    return noised(make_batch(rows=count, frames=6, height=1, width=1), **options)


def noise_of(batch: Batch, out: Noised) -> Tensor:
    return batch.latents.float() - out.target


def test_a_step_along_the_target_ends_at_the_clean_video() -> None:
    batch = make_batch()
    out = noised(batch)
    for tensor in (out.hidden_states, out.timestep, out.target):
        assert tensor.dtype == torch.float32
    assert out.timestep.shape == (3, 6)
    assert (out.timestep == out.timestep[:, :1]).all()
    assert ((out.timestep > 0) & (out.timestep < 1000)).all()
    sigma = (out.timestep / 1000)[:, None, :, None, None]
    clean = batch.latents.float()
    torch.testing.assert_close(out.hidden_states + sigma * out.target, clean)
    noise = noise_of(batch, out)
    torch.testing.assert_close(out.hidden_states, (1 - sigma) * clean + sigma * noise)


def test_noise_is_standard_normal() -> None:
    batch = make_batch(rows=4, frames=8, height=16, width=16)
    noise = noise_of(batch, noised(batch))
    count = noise.numel()  # 131,072
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(noise.pow(4).mean() - 3) < 4 * math.sqrt(96 / count)
    between = torch.corrcoef(noise.flatten(1)) - torch.eye(4)
    assert between.abs().max() < 4 / math.sqrt(count / 4), "rows share noise"


@pytest.mark.parametrize(("sigma", "shift", "expected"), [
    (0.0, 12.0, 0.0), (1.0, 12.0, 1.0), (0.5, 12.0, 6 / 6.5), (0.1, 12.0, 1.2 / 2.1),
    (0.3, 1.0, 0.3), (0.5, 3.0, 0.75),
])  # fmt: skip
def test_shift(sigma: float, shift: float, expected: float) -> None:
    assert shift_sigma(sigma, shift) == pytest.approx(expected, abs=1e-15)


def test_the_shift_is_the_sampler_s() -> None:
    sigmas = torch.linspace(1, 0.001, 40)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=12.0)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    ours = torch.tensor([1000 * shift_sigma(s, 12.0) for s in sigmas.tolist()])
    torch.testing.assert_close(ours, scheduler.timesteps.cpu(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 12.0])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 0.5)])
def test_logit_normal_timesteps(shift: float, mean: float, std: float) -> None:
    count = 4000
    out = many(count, flow_shift=shift, logit_mean=mean, logit_std=std)
    sigma = out.timestep[:, 0].double() / 1000
    logits = torch.logit(sigma / (shift - (shift - 1) * sigma))
    assert abs(logits.mean() - mean) < 4 * std / math.sqrt(count)
    assert abs(logits.std() - std) < 4 * std / math.sqrt(2 * count)
    inside = ((logits - mean).abs() < std).double().mean()
    assert abs(inside - 0.6827) < 4 * math.sqrt(0.6827 * 0.3173 / count)


@pytest.mark.parametrize("shift", [1.0, 12.0])
def test_uniform_timesteps(shift: float) -> None:
    count = 4000
    sigma = many(count, flow_shift=shift, timestep_sampling="uniform").timestep[:, 0] / 1000
    uniform = (sigma / (shift - (shift - 1) * sigma)).sort().values
    steps = (torch.arange(count) + 0.5) / count
    assert (uniform - steps).abs().max() < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov, p = 0.001


def test_the_mix_of_conditions() -> None:
    config = TrainConfig(image_to_video_probability=0.3, continuation_probability=0.2)
    blocks = 4000
    drawn = torch.tensor([draw_num_cond_latents(BLOCK * b, 24, config) for b in range(blocks)])
    for num_cond, share in ((0, 0.5), (1, 0.3), (4, 0.2)):
        found = float((drawn == num_cond).double().mean())
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / blocks), num_cond
    assert {draw_num_cond_latents(p, 24, TrainConfig()) for p in range(800)} == {0}


def test_a_block_of_positions_has_one_condition() -> None:
    config = TrainConfig(image_to_video_probability=0.3, continuation_probability=0.3)
    drawn = [draw_num_cond_latents(p, 24, config) for p in range(100 * BLOCK)]
    blocks = [set(drawn[i : i + BLOCK]) for i in range(0, len(drawn), BLOCK)]
    assert all(len(block) == 1 for block in blocks)
    assert len(set(drawn)) == 3
    other = TrainConfig(image_to_video_probability=0.3, continuation_probability=0.3, seed=1)
    assert drawn != [draw_num_cond_latents(p, 24, other) for p in range(100 * BLOCK)]


@pytest.mark.parametrize(("options", "frames", "expected"), [
    (IMAGE, 24, 1), (IMAGE, 2, 1), (IMAGE, 1, 0),
    (CONTINUATION, 24, 4), (CONTINUATION, 5, 4), (CONTINUATION, 4, 3), (CONTINUATION, 2, 1),
    (CONTINUATION, 1, 0),
])  # fmt: skip
def test_a_frame_is_left_to_make(options: dict[str, float], frames: int, expected: int) -> None:
    out = noised(make_batch(frames=frames), **options)
    assert out.num_cond_latents == expected
    assert ((out.timestep == 0).sum(dim=1) == expected).all()
    assert sample_losses(torch.zeros_like(out.target), out).isfinite().all()


def test_condition_frames_are_clean_but_for_slight_noise() -> None:
    batch = make_batch()
    clean = batch.latents.float()
    given = noised(batch, **CONTINUATION, condition_noise_max=0.05)
    exact = noised(batch, **CONTINUATION, condition_noise_max=0.0)
    plain = noised(batch)
    assert given.num_cond_latents == exact.num_cond_latents == 4
    assert torch.equal(exact.hidden_states[:, :, :4], clean[:, :, :4])
    for out in (given, exact):  # the others are as without condition
        assert torch.equal(out.hidden_states[:, :, 4:], plain.hidden_states[:, :, 4:])
        assert torch.equal(out.target, plain.target)
        assert torch.equal(out.timestep[:, 4:], plain.timestep[:, 4:])
    # x - clean = sigma (noise - clean), with one sigma a sample
    sigma = (clean - given.hidden_states)[:, :, :4] / given.target[:, :, :4]
    middle = sigma.flatten(1).median(dim=1).values
    assert ((middle > 0) & (middle < 0.05)).all()
    assert len(set(middle.tolist())) == 3
    moved = (given.hidden_states - clean)[:, :, :4]
    expected = -middle[:, None, None, None, None] * given.target[:, :, :4]
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_noise_on_conditions_is_uniform() -> None:
    count = 2000
    batch = make_batch(rows=count, frames=2, height=1, width=1)
    out = noised(batch, **IMAGE, condition_noise_max=0.2)
    moved = (batch.latents.float() - out.hidden_states)[:, :, 0].flatten(1)
    sigma = (moved.norm(dim=1) / out.target[:, :, 0].flatten(1).norm(dim=1)).sort().values
    steps = 0.2 * (torch.arange(count) + 0.5) / count
    assert (sigma - steps).abs().max() < 0.2 * 1.95 / math.sqrt(count)


def test_loss_is_the_mean_over_noise_frames() -> None:
    out = noised(make_batch(rows=2), **CONTINUATION)
    prediction = out.target.clone()
    prediction[:, :, :4] += 100  # condition frames
    assert sample_losses(prediction, out).tolist() == [0, 0]
    prediction[1, :, 4] += 2  # one of two noise frames
    prediction[0, 3, 5, 1, 2] += 3  # one element of 16 * 2 * 4 * 6
    losses = sample_losses(prediction, out)
    torch.testing.assert_close(losses, torch.tensor([9 / 768, 2.0]), rtol=1e-4, atol=0)
    assert sample_losses(prediction.bfloat16(), out).dtype == torch.float32


def test_a_row_depends_on_seed_position_and_row_alone() -> None:
    """The batch's size, the mix of shapes, earlier calls and torch's own generator change
    nothing."""
    options = {"image_to_video_probability": 0.4, "continuation_probability": 0.3}
    batch = make_batch(rows=4)
    torch.manual_seed(1)
    first = noised(batch, **options)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    noised(make_batch(rows=4, position=8), **options)
    again = noised(batch, **options)
    assert torch.equal(torch.get_rng_state(), state), "it draws from the shared generator"
    smaller = noised(make_batch(rows=2), **options)
    for name in ("hidden_states", "timestep", "target", "keeps_caption"):
        whole = getattr(first, name)
        assert torch.equal(getattr(again, name), whole), name
    assert torch.equal(smaller.timestep, first.timestep[:2])
    two = make_batch(rows=2)
    torch.testing.assert_close(
        noise_of(two, smaller), noise_of(batch, first)[:2], rtol=0, atol=1e-6
    )
    for changed in (make_batch(rows=4, position=8), make_batch(rows=4, position=7 + 2**32)):
        assert not torch.equal(noised(changed, **options).timestep, first.timestep)
    assert not torch.equal(noised(batch, seed=43, **options).timestep, first.timestep)


def test_one_option_does_not_change_what_others_draw() -> None:
    batch = make_batch()
    plain = noised(batch)
    for options in (
        {"caption_dropout_probability": 0.9},
        {"timestep_sampling": "uniform"},
        {"condition_noise_max": 0.5},
    ):
        assert torch.equal(noised(batch, **options).target, plain.target), options
    dropped = noised(batch, caption_dropout_probability=0.9)
    assert torch.equal(dropped.hidden_states, plain.hidden_states)


def test_hashes_are_the_same_everywhere() -> None:
    """A run resumes on another machine with the same noise, so they may not change."""
    assert hash_key(42, "row", 7, 0) == 0x9790B6D19A62CE20
    assert hash_key(1, 23) != hash_key(12, 3)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_share_of_dropped_captions(probability: float) -> None:
    count = 4000
    dropped = (~many(count, caption_dropout_probability=probability).keeps_caption).double().mean()
    bound = 4 * math.sqrt(probability * (1 - probability) / count)
    assert abs(dropped - probability) <= bound


def test_dropped_captions_become_the_empty_one() -> None:
    batch = make_batch(rows=3)
    empty = torch.full((1, 5, 8), 7.0).bfloat16(), torch.arange(5)[None] < 1
    keeps = torch.tensor([True, False, True])
    embeds, mask = apply_caption_dropout(batch, keeps, empty)
    assert embeds.dtype == torch.bfloat16
    assert mask.dtype == torch.bool
    for row in (0, 2):
        assert torch.equal(embeds[row], batch.caption_embeds[row])
        assert torch.equal(mask[row], batch.caption_mask[row])
    assert torch.equal(embeds[1], empty[0][0])
    assert torch.equal(mask[1], empty[1][0])


def test_it_moves_as_a_whole() -> None:
    out = noised(make_batch(), **IMAGE)
    moved = out.to(torch.device("meta"))
    assert moved.num_cond_latents == 1
    for name in ("hidden_states", "timestep", "target", "keeps_caption"):
        assert getattr(moved, name).is_meta
        assert getattr(moved, name).shape == getattr(out, name).shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_same_and_the_host_never_waits() -> None:
    batch, config = make_batch(), TrainConfig(image_to_video_probability=1.0)
    device = torch.device("cuda")
    empty = torch.zeros(1, 5, 8).bfloat16(), torch.arange(5)[None] < 1
    here = prepare(batch, config, CPU)
    torch.cuda.init()
    torch.cuda.set_sync_debug_mode("error")
    try:
        direct, moved = prepare(batch, config, device), here.pin_memory().to(device)
        captions = apply_caption_dropout(batch, direct.keeps_caption, empty)
        sample_losses(direct.target, direct)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("hidden_states", "timestep", "target", "keeps_caption"):
        assert torch.equal(getattr(direct, name).cpu(), getattr(here, name)), name
        assert torch.equal(getattr(moved, name).cpu(), getattr(here, name)), name
    for found, expected in zip(
        captions, apply_caption_dropout(batch, here.keeps_caption, empty), strict=True
    ):
        assert torch.equal(found.cpu(), expected)
