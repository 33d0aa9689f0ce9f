"""Sampling: prompt (and an image, or the end of a video) -> video frames.

    noise -> N steps of: transformer with and without the prompt -> guided -> Euler step -> VAE

Gives what meituan-longcat/LongCat-Video's longcat_video/pipeline_longcat_video.py gives. Training's
validation calls it with prompt embeddings, `generate.py` with the whole model.
Ships with an export; imports nothing else of this folder. Annotations are not postponed here:
diffusers reads those of `__init__`.
"""

import contextlib
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ftfy
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL.Image import Image, fromarray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

LAST_SIGMA = 0.001
TAIL_START, TAIL_STEPS = 500.0, 10  # of `enhance_hf`
# Best first on Hopper, where cuDNN's is 1.7 times as fast as flash.
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass
class LongCatVideoPipelineOutput(BaseOutput):
    """The output has one entry a prompt: a list of pictures ("pil"), or (T, H, W, 3) in 0..1
    ("np"), (T, 3, H, W) in 0..1 ("pt"), or normalized latents (16, t, h, w) ("latent")."""

    frames: list[list[Image]] | np.ndarray | Tensor


class LongCatVideoPipeline(DiffusionPipeline):
    """The pipeline makes text-to-video, image-to-video and continuations.

    `tokenizer` and `text_encoder` may be None where embeddings are given for all prompts;
    `max_sequence_length` is the number of text keys that the transformer was trained on.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: ModelMixin,
        max_sequence_length: int = 512,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae,
            scheduler=scheduler, transformer=transformer,
        )  # fmt: skip
        self.register_to_config(max_sequence_length=max_sequence_length)
        self.max_tokens = max_sequence_length
        self.vae: Any
        self.scheduler: Any
        self.transformer: Any
        self.frame_stride: int = self.vae.config.scale_factor_temporal
        self.pixel_stride: int = self.vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.pixel_stride)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] = "",
        *,
        image: Any = None,
        video: Any = None,
        num_cond_frames: int = 13,
        height: int = 480,
        width: int = 832,
        num_frames: int = 93,
        num_inference_steps: int = 40,
        guidance_scale: float = 4.0,
        use_optimized_scale: bool = True,
        enhance_hf: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
    ) -> LongCatVideoPipelineOutput:
        """Generates a video a prompt.

        Args:
            image: the first frame: a picture, or a list of one a prompt. PIL pictures and bytes
                (H, W, 3) are cut to the shape; other arrays and tensors, in 0..1, are squeezed.
            video: frames to continue, a list of pictures or bytes (T, H, W, 3); the last
                `num_cond_frames` are used, and stand at the beginning of the result.
            num_frames: of the whole result, 4n + 1.
            guidance_scale: at most 1 leaves the negative prompt out.
            use_optimized_scale: CFG-Zero*, as officially.
            enhance_hf: ends a continuation in even steps from timestep 500 down, as officially.
            latents: the noise, (B, 16, t, h, w); else drawn from `generator`.
            prompt_embeds: states of the text encoder (B, L, D) in place of `prompt`, with their
                mask (B, L); likewise the negative ones.

        Raises:
            ValueError: shapes that the model cannot make, or missing or contradictory inputs.
        """
        self._check_shape(num_frames, height, width)
        num_cond_frames = self._check_condition(image, video, num_cond_frames, num_frames)
        device = self._execution_device
        embeds, mask = self._embed(prompt, prompt_embeds, prompt_attention_mask)
        batch_size = len(embeds)
        if guidance_scale > 1:
            if negative_prompt_embeds is None and isinstance(negative_prompt, str):
                negative_prompt = [negative_prompt] * batch_size
            negative = self._embed(
                negative_prompt if negative_prompt_embeds is None else None,
                negative_prompt_embeds, negative_prompt_attention_mask,
            )  # fmt: skip
            embeds, mask = torch.cat((negative[0], embeds)), torch.cat((negative[1], mask))
        shape = (batch_size, *self.latent_shape(num_frames, height, width))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents={tuple(latents.shape)} are not of the shape asked, {shape}.")
        latents = latents.to(device, torch.float32, copy=True)
        num_cond_latents = -(-num_cond_frames // self.frame_stride)
        if num_cond_latents:
            clean = self.encode_condition(image, video, num_cond_frames, height, width)
            if len(clean) not in (1, batch_size):
                raise ValueError(f"{len(clean)} images were given for {batch_size} prompts.")
            latents[:, :, :num_cond_latents] = clean
        latents = self.denoise(
            latents, embeds, mask,
            timesteps=self.set_timesteps(
                num_inference_steps, device, enhance_hf=enhance_hf and video is not None
            ),
            guidance_scale=guidance_scale,
            num_cond_latents=num_cond_latents,
            use_optimized_scale=use_optimized_scale,
            # Over all frames officially, but those of a continuation, kept as keys and values.
            scale_from=num_cond_latents if video is not None else 0,
        )  # fmt: skip
        frames = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return LongCatVideoPipelineOutput(frames)

    def _check_shape(self, num_frames: int, height: int, width: int) -> None:
        stride, unit = self.frame_stride, self.pixel_stride * 2
        if num_frames < 1 or num_frames % stride != 1:
            raise ValueError(
                f"num_frames={num_frames} must be {stride}n + 1, for example "
                f"{max(num_frames, 1) // stride * stride + 1}: the VAE packs {stride} frames into "
                "one, but the first."
            )
        for name, size in (("height", height), ("width", width)):
            if size < unit or size % unit:
                near = max(round(size / unit), 1) * unit
                raise ValueError(f"{name}={size} must be a multiple of {unit}, for example {near}.")

    def _check_condition(
        self, image: Any, video: Any, num_cond_frames: int, num_frames: int
    ) -> int:
        """Returns how many frames are given."""
        if image is not None and video is not None:
            raise ValueError("Give an image or a video to start from, not both.")
        if image is None and video is None:
            return 0
        given = 1 if image is not None else num_cond_frames
        if given < 1 or given % self.frame_stride != 1 or given >= num_frames:
            raise ValueError(
                f"num_cond_frames={given} must be {self.frame_stride}n + 1 and below "
                f"num_frames={num_frames}."
            )
        if video is not None and len(video) < given:
            raise ValueError(f"video has {len(video)} frames, and num_cond_frames={given}.")
        return given

    def _embed(
        self, prompt: str | list[str] | None, embeds: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns what was given, or is made of the prompt: states (B, L, D) and mask (B, L)."""
        if prompt is not None and embeds is None:
            return self.encode_prompt(prompt)
        if prompt is not None or embeds is None or mask is None:
            raise ValueError(
                "Give either prompt, or prompt_embeds and prompt_attention_mask; with guidance "
                "and no text encoder the negative ones too."
            )
        return embeds.to(self._execution_device), mask.to(self._execution_device)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Returns (16, t, h, w)."""
        channels = self.transformer.config["in_channels"]
        frames = (num_frames - 1) // self.frame_stride + 1
        return channels, frames, height // self.pixel_stride, width // self.pixel_stride

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str]) -> tuple[Tensor, Tensor]:
        """Returns states (B, L, D) of the cleaned prompts, padded to L tokens, and mask (B, L)."""
        if self.text_encoder is None:
            raise ValueError("This pipeline has no text encoder: give embeddings for all prompts.")
        texts = [clean_prompt(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self._execution_device)  # fmt: skip
        states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return states.last_hidden_state, tokens.attention_mask

    @torch.no_grad()
    def encode_condition(
        self, image: Any, video: Any, num_cond_frames: int, height: int, width: int
    ) -> Tensor:
        """Returns normalized latents (B or 1, 16, t, h, w), the mean as training has it."""
        if video is None:
            pictures = list(image) if isinstance(image, list | tuple) else [image]
        else:
            pictures = list(video[-num_cond_frames:])
        pictures = [as_picture(picture) for picture in pictures]
        mode: Any = {"resize_mode": "crop"} if isinstance(pictures[0], Image) else {}
        pixels = self.video_processor.preprocess(pictures, height, width, **mode)  # (N, 3, H, W)
        # (B, 3, 1, H, W) of pictures, (1, 3, T, H, W) of a video
        pixels = pixels[:, :, None] if video is None else pixels.transpose(0, 1)[None]
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        return (latents - self.statistics("mean", latents)) / self.statistics("std", latents)

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        embeds: Tensor,
        mask: Tensor,
        *,
        timesteps: Tensor,
        guidance_scale: float,
        num_cond_latents: int,
        use_optimized_scale: bool,
        scale_from: int,
    ) -> Tensor:
        """Denoises latents (B, 16, t, h, w) float32 in place; the first `num_cond_latents` stay.

        `embeds` (B or 2B, L, D) with the negative prompts first, `mask` (B or 2B, L). The scale of
        the guidance is taken over the frames from `scale_from` on.
        """
        copies = len(embeds) // len(latents)
        bar: Any = self.progress_bar(timesteps)  # pyright: ignore
        for time in bar:
            frame_times = time.repeat(len(embeds), latents.shape[2])  # (B or 2B, t)
            frame_times[:, :num_cond_latents] = 0
            with best_attention():
                prediction = self.transformer(
                    hidden_states=torch.cat([latents] * copies),
                    timestep=frame_times,
                    encoder_hidden_states=embeds.unsqueeze(1),
                    encoder_attention_mask=mask,
                    num_cond_latents=num_cond_latents,
                )
            if copies == 2:
                negative, positive = prediction.chunk(2)
                if use_optimized_scale:
                    negative = negative * optimized_scale(
                        positive[:, :, scale_from:], negative[:, :, scale_from:]
                    )
                prediction = negative + guidance_scale * (positive - negative)
            # The model predicts clean minus noise; the scheduler expects noise minus clean.
            latents[:, :, num_cond_latents:] = self.scheduler.step(
                -prediction[:, :, num_cond_latents:],
                time,
                latents[:, :, num_cond_latents:],
                return_dict=False,
            )[0]
        return latents

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device, *, enhance_hf: bool = False
    ) -> Tensor:
        """Sets the scheduler up; returns its timesteps (N,), falling from 1000."""
        sigmas = torch.linspace(1, LAST_SIGMA, num_inference_steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        if enhance_hf:
            times = self.scheduler.timesteps
            tail = TAIL_START * torch.arange(TAIL_STEPS, 0, -1, device=device) / TAIL_STEPS
            times = torch.cat((times[times > TAIL_START], tail))
            self.scheduler.timesteps = times
            self.scheduler.sigmas = torch.cat((times / 1000, times.new_zeros(1)))
        self.scheduler.set_begin_index(0)
        return self.scheduler.timesteps

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Decodes normalized latents (B, 16, t, h, w) to frames of `output_type`."""
        latents = latents * self.statistics("std", latents) + self.statistics("mean", latents)
        video = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)

    def statistics(self, name: str, latents: Tensor) -> Tensor:
        """Returns the "mean" or "std" of raw latents, (16, 1, 1, 1)."""
        values = self.vae.config[f"latents_{name}"]
        return torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)


def optimized_scale(positive: Tensor, negative: Tensor) -> Tensor:
    """Computes CFG-Zero*, arXiv 2503.18886: <v+, v-> / |v-|^2 of each sample, (B, 1, 1, 1, 1)."""
    dims = (1, 2, 3, 4)
    dot = (positive * negative).sum(dims, keepdim=True)
    return dot / (negative.square().sum(dims, keepdim=True) + 1e-8)


def clean_prompt(text: str) -> str:
    """Applies the official rules: broken encodings fixed, HTML entities undone twice, runs of white
    space made one blank."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def as_picture(frame: Any) -> Any:
    """Makes a picture of bytes (H, W, 3); returns anything else as it is."""
    return fromarray(frame) if getattr(frame, "dtype", None) == np.uint8 else frame


@contextlib.contextmanager
def best_attention() -> Iterator[None]:
    """Prefers the fastest attention, unless someone has ruled some of the kinds out."""
    cuda = torch.backends.cuda
    flags = (cuda.cudnn_sdp_enabled, cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled)
    is_open = cuda.math_sdp_enabled() and all(enabled() for enabled in flags)
    with sdpa_kernel(KERNELS, set_priority=True) if is_open else contextlib.nullcontext():
        yield
