"""Rectified flow as LongCat-Video has it: latents -> what the transformer sees and must predict.

    x_t = (1 - s) clean + s noise,  timestep = 1000 s,  the model predicts clean - noise

The official pipeline negates the prediction before diffusers' Euler step, which moves along
dx/ds = noise - clean (longcat_video/pipeline_longcat_video.py); trained on noise - clean the loss
falls as well and all videos are noise.

Everything random in a row is a function of (seed, position, row), drawn on the CPU: the same on any
number of devices and after a resume. Nothing here makes the host wait for the device.

B samples; T latent frames, h x w latents each; L text tokens, D the text encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from longcat_video_fft.dataset.sampler import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    from longcat_video_fft.dataset.latents import Batch
    from longcat_video_fft.options.config import TrainConfig

NUM_TIMESTEPS = 1000
# Official: an image is one latent frame; continuation takes 13 frames of video, which are four.
IMAGE_LATENTS, CONTINUATION_LATENTS = 1, 4


@dataclass(frozen=True)
class Noised:
    """A noised batch holds what one forward takes and what its output is compared with."""

    hidden_states: Tensor  # (B, 16, T, h, w) float32; the model casts
    timestep: Tensor  # (B, T) float32, 0..1000; 0 for condition frames, as at inference
    target: Tensor  # (B, 16, T, h, w) float32, clean - noise
    num_cond_latents: int  # so many first frames are given and have no loss
    keeps_caption: Tensor  # (B,) bool

    def to(self, device: torch.device) -> Noised:
        """Copies it to `device`; the host does not wait."""
        return self._map(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Noised:
        """Pins the tensors; torch's loader calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Noised:
        names = ("hidden_states", "timestep", "target", "keeps_caption")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class Draw:
    """A draw holds the random numbers of one sample."""

    sigma: float
    sigma_cond: float  # of condition frames
    keeps_caption: bool
    noise: Tensor  # (16, T, h, w) float32, on the CPU


def prepare(batch: Batch, config: TrainConfig, device: torch.device) -> Noised:
    """Draws timesteps, noise, condition frames and caption dropout for a micro-batch."""
    num_rows, _, num_frames, _, _ = batch.latents.shape
    num_cond = draw_num_cond_latents(batch.position, num_frames, config)
    draws = [draw_row(batch, row, config) for row in range(num_rows)]
    is_cond = torch.arange(num_frames) < num_cond  # (T,)
    sigmas = torch.where(
        is_cond,
        torch.tensor([d.sigma_cond for d in draws])[:, None],
        torch.tensor([d.sigma for d in draws])[:, None],
    )  # (B, T)
    hidden_states, target = add_noise(
        to_device(batch.latents, device),
        to_device(torch.stack([d.noise for d in draws]), device),
        to_device(sigmas, device),
    )
    return Noised(
        hidden_states=hidden_states,
        timestep=to_device((NUM_TIMESTEPS * sigmas).masked_fill(is_cond, 0.0), device),
        target=target,
        num_cond_latents=num_cond,
        keeps_caption=to_device(torch.tensor([d.keeps_caption for d in draws]), device),
    )


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (x_t, clean - noise) from (B, 16, T, h, w) twice and sigmas (B, T), in float32."""
    clean, s = latents.float(), sigmas[:, None, :, None, None]
    return (1 - s) * clean + s * noise, clean - noise


def apply_caption_dropout(
    batch: Batch, keeps_caption: Tensor, empty: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns the batch's caption embeddings (B, L, D) and mask (B, L) on `keeps_caption`'s device,
    with the empty caption, ((1, L, D), (1, L)), for samples (B,) that keep none."""
    device = keeps_caption.device
    embeds, mask = (to_device(t, device) for t in (batch.caption_embeds, batch.caption_mask))
    empty_embeds, empty_mask = (to_device(t, device) for t in empty)
    return (
        torch.where(keeps_caption[:, None, None], embeds, empty_embeds),
        torch.where(keeps_caption[:, None], mask, empty_mask),
    )


def draw_num_cond_latents(position: int, num_frames: int, config: TrainConfig) -> int:
    """Draws how many latent frames the micro-batch is given: none, an image, or a video to
    continue.

    One draw for a block of positions, as dataset/sampler.py has them of one bucket, so that devices
    at work on one step do the same. At least one frame is left to make: a clip of 2 to 4 latent
    frames is given fewer for continuation, and one of a single frame is always made from its text.
    """
    share = hash_key(config.seed, "condition", position // BLOCK) / 2**64
    wanted = 0
    if share < config.image_to_video_probability:
        wanted = IMAGE_LATENTS
    elif share < config.image_to_video_probability + config.continuation_probability:
        wanted = CONTINUATION_LATENTS
    return min(wanted, num_frames - 1)


def draw_row(batch: Batch, row: int, config: TrainConfig) -> Draw:
    """Draws the numbers of sample `row`. Condition frames are perturbed a little, as the authors do
    (meituan-longcat/LongCat-Video#4), since at inference they come from a decoded video."""
    generator = make_generator(config.seed, "row", batch.position, row)
    # Every number is drawn whatever the options, so that one option does not change the others'.
    normal = torch.randn((), generator=generator, dtype=torch.float64)
    uniform, cond, kept = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    if config.timestep_sampling == "logit_normal":
        uniform = float(torch.sigmoid(config.logit_mean + config.logit_std * normal))
    return Draw(
        sigma=shift_sigma(uniform, config.flow_shift),
        sigma_cond=cond * config.condition_noise_max,
        keeps_caption=kept >= config.caption_dropout_probability,
        noise=torch.randn(batch.latents.shape[1:], generator=generator),
    )


def shift_sigma(sigma: float, shift: float) -> float:
    """Moves noise levels in 0..1 towards 1 (Esser et al. 2024, equation 23); the official 12 puts
    half of them above 0.92."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_generator(*key: object) -> torch.Generator:
    """Makes a CPU generator for this key alone, or for 32 bits of its hash: torch takes no more."""
    return torch.Generator().manual_seed(hash_key(*key))


def hash_key(*key: object) -> int:
    """Hashes the key to 64 bits, the same in every process."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, key)).encode())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies; to a GPU from pinned memory, else the host would wait for all queued work."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
