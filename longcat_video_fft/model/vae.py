"""The video encoder: Wan's VAE from diffusers, driven in longer pieces than diffusers does.

    frames (T, H, W, 3) uint8 -> latents (16, t, h, w) bf16: (mean - latents_mean) / latents_std

diffusers encodes 1 + 4 + 4 + ... frames, each piece with the state of the one before. The encoder
is causal, so longer pieces give the same latents; they use a GPU better, and compiling
fuses what lies between the convolutions. One video a call: its bytes do not depend on others.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

logger = logging.getLogger(__name__)

# Compiling a shape takes about a minute and then saves 0.4 s a video (README.md, "Measured").
COMPILE_FROM = 200


@dataclass(frozen=True)
class Pending:
    """A pending result holds latents that a GPU may not have finished yet."""

    host: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """Returns (16, t, h, w) bf16 on the CPU."""
        if self.done is not None:
            self.done.synchronize()
        return self.host


class VideoEncoder:
    """Makes latents on `device`.

    Args:
        vae: on `device`, in its dtype, in eval mode.
        chunk_frames: frames a piece, a multiple of 4.
    """

    def __init__(self, vae: AutoencoderKLWan, device: torch.device, *, chunk_frames: int) -> None:
        self.vae = vae
        self.device = device
        self.dtype = next(vae.parameters()).dtype
        self.chunk_frames = chunk_frames
        self.compiled: nn.Module | None = None
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)  # pyright: ignore
        self.std = torch.tensor(vae.config.latents_std, device=device).view(shape)  # pyright: ignore

    def prepare(self, frames: np.ndarray) -> Tensor:
        """Makes frames ready to be copied to a GPU while it works; for the worker threads."""
        pixels = torch.from_numpy(frames)
        return pixels.pin_memory() if self.device.type == "cuda" else pixels

    @torch.inference_mode()
    def encode(self, pixels: Tensor, *, compiled: bool = False) -> Pending:
        """Encodes (T, H, W, 3) uint8 -> (16, t, h, w) bf16; returns while a GPU is at work."""
        pixels = pixels.to(self.device, non_blocking=True)
        # (1, 3, T, H, W) in memory as it came, which is the convolutions' channels-last order
        video = pixels.permute(3, 0, 1, 2).unsqueeze(0).to(self.dtype) / 127.5 - 1.0
        video = video.contiguous(memory_format=torch.channels_last_3d)
        statistics = self._encode_pieces(video, compiled=compiled)
        mean = statistics.chunk(2, dim=1)[0].float()
        latents = ((mean - self.mean) / self.std)[0].to(torch.bfloat16).contiguous()
        if self.device.type != "cuda":
            return Pending(latents, None)
        # Copied in the stream's order, so that waiting for it does not wait for the next video.
        host = torch.empty(latents.shape, dtype=latents.dtype, pin_memory=True)
        host.copy_(latents, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Pending(host, done)

    def _encode_pieces(self, video: Tensor, *, compiled: bool) -> Tensor:
        """Encodes (1, 3, T, H, W) -> (1, 32, t, h, w): mean and log variance.

        As `AutoencoderKLWan._encode` in diffusers, with longer pieces.
        """
        encoder = self.vae.encoder
        if compiled:
            if self.compiled is None:
                self.compiled = torch.compile(encoder, dynamic=False)  # pyright: ignore
            encoder = self.compiled
        states: list[Tensor | None] = [None] * self.vae._cached_conv_counts["encoder"]
        num_frames = video.shape[2]
        starts = [0, *range(1, num_frames, self.chunk_frames)]
        ends = [*starts[1:], num_frames]
        pieces = [
            encoder(video[:, :, start:end], feat_cache=states, feat_idx=[0])  # pyright: ignore
            for start, end in zip(starts, ends, strict=True)
        ]
        return self.vae.quant_conv(torch.cat(pieces, dim=2))


def load_video_encoder(
    folder: Path, device: torch.device, *, dtype: torch.dtype, chunk_frames: int
) -> VideoEncoder:
    """Loads the VAE of a folder in the diffusers layout.

    Raises:
        ValueError: no Wan VAE there.
    """
    started = time.monotonic()
    try:
        vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: no Wan VAE in the diffusers layout ({error}). It is the folder vae/ of "
            "LongCat-Video."
        ) from error
    nn.Module.to(vae, device=device)
    vae.eval().requires_grad_(False)
    use_channels_last(vae)
    torch.backends.cudnn.benchmark = False  # a tuned kernel could differ from run to run
    torch._dynamo.config.recompile_limit = 64  # a graph for each shape and length of piece
    logger.info("VAE from %s in %.0f s", folder, time.monotonic() - started)
    return VideoEncoder(vae, device, chunk_frames=chunk_frames)


def use_channels_last(vae: nn.Module) -> None:
    """Puts the weights in the order of the pictures, else each call converts them."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
