"""Every validation_step_interval steps: videos of fixed prompts, and the held-out loss.

All processes take part, with as many forwards each, since those of sharded weights are collective:
each samples other videos (prompts x seeds are shared out), decodes its own, and writes it to
OUT/validation/step-N/K.mp4, so that none waits long for another. The prompts are embedded before
the transformer is built, after which the text encoder is dropped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longcat_video_fft.dataset.captions import clean_caption
from longcat_video_fft.media.video_file import FPS, read_frames, write_mp4
from longcat_video_fft.model.loading import reshard
from longcat_video_fft.model.pipeline import LongCatVideoPipeline
from longcat_video_fft.model.text_encoder import TextEncoder, load_tokenizer
from longcat_video_fft.options.config_rules import parse_resolution
from longcat_video_fft.precompute.job import find_models
from longcat_video_fft.training.distributed import all_sum, is_main_process
from longcat_video_fft.training.held_out import held_out_loss
from longcat_video_fft.training.video_log import log_video

if TYPE_CHECKING:
    from longcat_video_fft.dataset.latents import LatentDataset
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.training.parallel import Engine
    from longcat_video_fft.training.tracker import Tracker

logger = logging.getLogger(__name__)

EMBEDDINGS = "validation_prompts.safetensors"


class Validation:
    """Embeds the prompts when built, for which rank 0 loads the text encoder; keeps the VAE in
    host memory. All processes build it, in a process group.

    Raises:
        ValueError: no prompt in the file, one that is too long, or no VAE or text encoder.
    """

    def __init__(self, config: TrainConfig, dataset: LatentDataset, output_dir: Path) -> None:
        self.config = config
        self.dataset = dataset
        self.output_dir = output_dir
        self.shape = parse_resolution(config.validation_resolution)
        prompts = read_prompts(config)
        count = config.num_validation_images
        self.videos = [(prompt, seed) for prompt in prompts for seed in range(count)]
        if not self.videos:
            return
        models = find_models(config)
        self.embeddings = encode_validation_prompts(config, prompts, output_dir)
        dtype = torch.bfloat16 if config.vae_dtype == "bf16" else torch.float32
        vae: Any = AutoencoderKLWan.from_pretrained(models.vae, torch_dtype=dtype)
        self.vae = vae.eval().requires_grad_(False)

    def run(self, engine: Engine, step: int, tracker: Tracker) -> dict[str, float]:
        """Makes the videos of a step, and shows them; returns metrics.

        With averaged weights where there are any. A video that cannot be decoded or written is
        reported and counted, and does not end the run.
        """
        started = time.monotonic()
        module: Any = engine.module
        was_training = module.training
        module.eval()
        average = engine.ema.swapped(module) if engine.ema else contextlib.nullcontext()
        with average:
            metrics = held_out_loss(engine, self.dataset, self.config)
            if self.videos:
                metrics["validation/failed_videos"] = self._make_videos(engine, step)
            reshard(module)
        module.train(was_training)
        if self.videos:
            metrics["validation/seconds"] = time.monotonic() - started
            self._show(tracker, step)
        return metrics

    def folder(self, step: int) -> Path:
        return self.output_dir / "validation" / f"step-{step}"

    def _make_videos(self, engine: Engine, step: int) -> float:
        """Samples and writes all videos; returns how many failed."""
        on_gpu = engine.device.type == "cuda"
        pipe = self._pipeline(engine)
        failed = 0
        if on_gpu:  # the step's memory, for other shapes
            torch.cuda.empty_cache()
        for start in range(0, len(self.videos), engine.dp_size):
            place = start + engine.dp_rank
            # Where videos run out, a repeat keeps the processes in step; it is not written.
            prompt, seed = self.videos[min(place, len(self.videos) - 1)]
            latents = self._sample(pipe, engine, prompt, seed)
            is_writer = dist.get_rank() % self.config.context_parallel_size == 0
            if place < len(self.videos) and is_writer:
                try:
                    frames: Any = pipe.decode(latents, "np")
                    frames = (frames[0] * 255 + 0.5).astype("uint8")
                    write_mp4(self.folder(step) / f"{place}.mp4", frames)
                except (OSError, RuntimeError) as error:  # full disk, no memory
                    failed += 1
                    logger.error("validation video %d of step %d: %s", place, step, error)
        self.vae.to("cpu")
        if on_gpu:
            torch.cuda.empty_cache()
        return float(all_sum(torch.tensor([float(failed)]))[0])

    def _pipeline(self, engine: Engine) -> LongCatVideoPipeline:
        nothing: Any = None  # no text encoder: embeddings are given
        pipe = LongCatVideoPipeline(
            nothing,
            nothing,
            self.vae.to(engine.device),
            FlowMatchEulerDiscreteScheduler(shift=self.config.flow_shift),
            engine.module,
            max_sequence_length=self.config.max_text_tokens,
        )
        pipe.set_progress_bar_config(
            desc="validation", disable=not is_main_process(), leave=False, dynamic_ncols=True
        )
        return pipe

    def _sample(self, pipe: LongCatVideoPipeline, engine: Engine, prompt: str, seed: int) -> Tensor:
        """Samples latents (1, 16, t, h, w): the same noise for a seed at any step and device."""
        config = self.config
        embeds, mask = self.dataset.pad([self.embeddings[clean_caption(prompt)]])
        negative = clean_caption(config.validation_negative_prompt)
        negative_embeds, negative_mask = self.dataset.pad([self.embeddings[negative]])
        with engine.attention():
            latents: Any = pipe(
                prompt_embeds=embeds,
                prompt_attention_mask=mask,
                negative_prompt_embeds=negative_embeds,
                negative_prompt_attention_mask=negative_mask,
                height=self.shape[0],
                width=self.shape[1],
                num_frames=config.validation_num_video_frames,
                num_inference_steps=config.validation_num_inference_steps,
                guidance_scale=config.validation_guidance,
                generator=torch.Generator().manual_seed(config.seed + seed),
                output_type="latent",
            ).frames
        return latents

    def _show(self, tracker: Tracker, step: int) -> None:
        """Sends the videos of all processes, whose disk it shares, from rank 0 to the tracker."""
        dist.barrier()
        if not is_main_process():
            return
        for number, (prompt, _) in enumerate(self.videos):
            path = self.folder(step) / f"{number}.mp4"
            if path.is_file():
                frames = read_frames(path, self.shape, fps=FPS)
                name = f"validation/{number}"
                log_video(tracker, name, path, frames, step=step, caption=prompt)


def read_prompts(config: TrainConfig) -> list[str]:
    """Returns validation_prompt itself, or the lines of the .txt file that it names; [] for null.

    Raises:
        ValueError: no such file, or nothing in it.
    """
    text = config.validation_prompt
    if text is None:
        return []
    if not text.endswith(".txt") or "\n" in text:
        return [text]
    path = next((p for p in (Path(text), config.folder / text) if p.is_file()), None)
    if path is None:
        raise ValueError(f"{config.source}: validation_prompt={text}: no such file.")
    prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{config.source}: validation_prompt={text}: holds no prompt.")
    return prompts


def encode_validation_prompts(
    config: TrainConfig, prompts: list[str], output_dir: Path
) -> dict[str, Tensor]:
    """Embeds each cleaned prompt: states of its valid tokens (L, D) bf16, the negative prompt's
    too.

    Rank 0 makes them, unless a run before this one did; the others read OUT's file.
    """
    models = find_models(config)
    texts = sorted({clean_caption(text) for text in [*prompts, config.validation_negative_prompt]})
    path = output_dir / EMBEDDINGS
    identity = {"texts": json.dumps(texts), "text_encoder": str(models.text_encoder)}
    if is_main_process() and read_identity(path) != identity:
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        encoder = TextEncoder(models.text_encoder, load_tokenizer(models.tokenizer), device)
        states = {str(number): encoder.encode([text])[0] for number, text in enumerate(texts)}
        del encoder
        if gpu:
            torch.cuda.empty_cache()
        output_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        save_file(states, partial, metadata=identity)
        partial.replace(path)
    dist.barrier()
    with safe_open(path, "pt") as file:
        embeddings = {text: file.get_tensor(str(number)) for number, text in enumerate(texts)}
    for text, states in embeddings.items():
        if len(states) > config.max_text_tokens:
            raise ValueError(
                f"{config.source}: validation_prompt or validation_negative_prompt is of "
                f"{len(states)} tokens ({text[:40]!r}...), and max_text_tokens="
                f"{config.max_text_tokens}. Shorten it."
            )
    return embeddings


def read_identity(path: Path) -> dict[str, str] | None:
    """Returns what the file was made of; None without one."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return file.metadata()
