"""The direction of the loss is the sampler's: a model overfitted to one video generates it.

With the sign of the target turned the loss falls just as well, and the video is noise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from longcat_video_fft.dataset.latents import Batch
from longcat_video_fft.model.flow_matching import prepare
from longcat_video_fft.model.loss import sample_losses
from longcat_video_fft.model.pipeline import LongCatVideoPipeline
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.buckets import Bucket
from longcat_video_fft.options.config import TrainConfig

BUCKET = Bucket(9, 32, 48)  # latents of 3 x 4 x 6
ROWS, TOKENS, WIDTH, STEPS = 8, 4, 16, 400


def train(video: Tensor, text: Tensor, *, sign: int) -> tuple[Any, list[float]]:
    """Returns the tiny model after STEPS steps on one video (1, 16, 3, 4, 6), and its losses."""
    torch.manual_seed(0)
    model = LongCatVideoTransformer3DModel(
        hidden_size=96, depth=2, num_heads=2, caption_channels=WIDTH, adaln_tembed_dim=64,
        text_tokens_zero_pad=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    # Uniform: so few steps would else hardly see the low noise where sampling ends.
    config = TrainConfig(timestep_sampling="uniform")
    losses = []
    for position in range(STEPS):
        batch = Batch(
            names=["video.mp4"] * ROWS,
            bucket=BUCKET,
            latents=video.expand(ROWS, -1, -1, -1, -1),
            caption_embeds=text.expand(ROWS, -1, -1),
            caption_mask=torch.ones(ROWS, TOKENS, dtype=torch.bool),
            position=position,
        )
        noised = prepare(batch, config, torch.device("cpu"))
        noised = replace(noised, target=sign * noised.target)
        prediction = model(
            noised.hidden_states, noised.timestep, batch.caption_embeds[:, None],
            batch.caption_mask, noised.num_cond_latents,
        )  # fmt: skip
        loss = sample_losses(prediction, noised).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return model, losses


def generate(model: Any, text: Tensor) -> Tensor:
    """Generates latents (1, 16, 3, 4, 6) by the pipeline with its official scheduler and steps."""
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
    pipeline = LongCatVideoPipeline(
        **parts,
        vae=AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=12.0),
        transformer=model,
    )
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        num_frames=BUCKET.num_frames,
        height=BUCKET.height,
        width=BUCKET.width,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(99),
        prompt_embeds=text,
        prompt_attention_mask=torch.ones(1, TOKENS, dtype=torch.bool),
        output_type="latent",
    ).frames
    assert isinstance(latents, Tensor)
    return latents


def test_an_overfitted_model_generates_its_video_and_only_with_this_sign() -> None:
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(1, *BUCKET.latent_shape, generator=generator)
    text = torch.randn(1, TOKENS, WIDTH, generator=generator)
    errors = {}
    for sign in (1, -1):
        model, losses = train(video, text, sign=sign)
        # Both learn; the loss alone would not distinguish them.
        assert sum(losses[-20:]) < 0.3 * sum(losses[:20]), sign
        errors[sign] = float((generate(model, text) - video).norm() / video.norm())
    assert errors[1] < 0.25  # 0.13 was seen
    assert errors[-1] > 1.0  # farther than an empty video; 3.3 was seen
