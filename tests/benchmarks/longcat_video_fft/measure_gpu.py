"""Videos a second on a GPU, with the real shapes and random weights; README.md has its numbers.

    python -m tests.benchmarks.longcat_video_fft.measure_gpu WORK_DIR [--count 100]

Makes a model of the released size (12 GB), 1280x720 videos of 6.4 s and 5 s, and runs the job's own
parts over them: survey, captions, videos. The first videos of a length compile and are not timed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from data.make_videos import make_videos
from longcat_video_fft.dataset.cache import ShardWriter
from longcat_video_fft.dataset.latents import LatentDataset
from longcat_video_fft.dataset.sources import open_caches, open_videos
from longcat_video_fft.media.decoding import decode_sample
from longcat_video_fft.model.text_encoder import TextEncoder, load_tokenizer
from longcat_video_fft.model.vae import VideoEncoder, load_video_encoder
from longcat_video_fft.options.load import load_config, load_data_config
from longcat_video_fft.precompute import encoding, job
from longcat_video_fft.precompute.processes import Processes
from tests.longcat_video_fft.support.tiny import Tiny, make_tokenizer, write_configs

NUM_DIFFERENT = 16
WARM_UP = 3
UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64,
}  # fmt: skip


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def make_model(folder: Path) -> None:
    """Makes the released shapes: Wan's VAE and UMT5-XXL's encoder, random."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan()
    nn.Module.to(vae, dtype=torch.bfloat16)
    vae.save_pretrained(folder / "vae")
    make_tokenizer(folder / "tokenizer")
    with torch.device("cuda"):
        encoder = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
    nn.Module.to(encoder, dtype=torch.bfloat16)
    encoder.save_pretrained(folder / "text_encoder")


def make_folder(folder: Path, seconds: float, count: int) -> None:
    """Makes `count` videos, of which NUM_DIFFERENT are different and the others links to them."""
    options = {"width": 1280, "height": 720, "fps": 30, "show_progress": False}
    made = make_videos(folder, count=NUM_DIFFERENT, seconds=seconds, workers=8, **options)
    files = sorted(made.folder.rglob("*.mp4"))
    for number in range(count):
        source = files[number % NUM_DIFFERENT]
        for ending in (".mp4", ".txt"):
            os.link(source.with_suffix(ending), folder / f"link-{number:05d}{ending}")
    for file in files:
        file.unlink()
        file.with_suffix(".txt").unlink()


def build_stage(config: Any, data: Any, models: Any, *, compiles: bool) -> encoding.VideoStage:
    device = torch.device("cuda")
    chunk = config.vae_chunk_frames
    return encoding.VideoStage(
        open_videos(data),
        data.rule,
        load_video_encoder(models.vae, device, dtype=torch.bfloat16, chunk_frames=chunk),
        ShardWriter(data.latent_cache, 0),
        encoding.Failures(data.latent_cache, 0),
        workers=min(job.MAX_DECODE_WORKERS, os.cpu_count() or 1),
        compiles=compiles,
        on_done=lambda *_: None,
    )


def time_stage(stage: encoding.VideoStage, jobs: list[Any], title: str) -> None:
    encoding.COMPILE_FROM = 1
    started = time.perf_counter()
    stage.run(jobs[:WARM_UP])
    warm_up = time.perf_counter() - started
    stage.seconds.clear()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    stage.run(jobs[WARM_UP:])
    stage.writer.close()
    seconds = time.perf_counter() - started
    number = len(jobs) - WARM_UP
    parts = ", ".join(f"{name} {spent / number * 1e3:.0f}" for name, spent in stage.seconds.items())
    say(
        f"{title}: {number / seconds:.2f} videos/s over {number} (ms a video: {parts}); "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; first {WARM_UP}: {warm_up:.0f} s"
    )


def compare(encoder: VideoEncoder, data: Any, name: str) -> None:
    """Compares our pieces, compiled and not, and diffusers' own encode, with fp32."""
    frames = decode_sample(open_videos(data).read(name), data.rule).frames
    pixels = encoder.prepare(frames)
    ours = encoder.encode(pixels, compiled=True).wait().float()
    again = encoder.encode(pixels, compiled=True).wait().float()
    eager = encoder.encode(pixels).wait().float()
    video = pixels.cuda().permute(3, 0, 1, 2)[None]
    with torch.inference_mode():

        def official(dtype: torch.dtype) -> torch.Tensor:
            latents = encoder.vae.encode(video.to(dtype) / 127.5 - 1).latent_dist.mode().float()  # pyright: ignore
            return ((latents - encoder.mean) / encoder.std)[0].cpu()

        theirs = official(torch.bfloat16)
        encoder.vae.float()
        exact = official(torch.float32)
        nn.Module.to(encoder.vae, dtype=torch.bfloat16)

    def distance(a: torch.Tensor) -> str:
        return f"{((a - exact).norm() / exact.norm()).item():.2e}"

    again_is = "equal" if ours.equal(again) else "not equal"
    say(
        f"to diffusers in fp32: compiled {distance(ours)}, eager {distance(eager)}, diffusers in "
        f"bf16 {distance(theirs)}; the same video again is {again_is}"
    )


def time_text(models: Any) -> None:
    encoder = TextEncoder(
        models.text_encoder, load_tokenizer(models.tokenizer), torch.device("cuda")
    )
    captions = [f"{number:04d}".ljust(127, "a") for number in range(32)]
    encoder.encode(captions)
    started = time.perf_counter()
    for _ in range(10):
        encoder.encode(captions)
    seconds = (time.perf_counter() - started) / 10
    say(f"UMT5-XXL, 32 captions of 128 tokens: {seconds * 1e3:.0f} ms, {32 / seconds:.0f}/s")
    del encoder
    job.release_memory()


def time_reads(data: Any) -> None:
    cache, _ = open_caches(data)
    entries = list(cache)
    for title in ("first", "again"):
        started = time.perf_counter()
        num_bytes = sum(cache.read(entry).nbytes for entry in entries)
        seconds = time.perf_counter() - started
        say(
            f"cache reads, {title}: {len(entries) / seconds:.0f} samples/s, "
            f"{num_bytes / seconds / 1e9:.2f} GB/s, one thread, checksums compared"
        )
    dataset = LatentDataset(data, batch_size=1, seed=0)
    started = time.perf_counter()
    for position in range(50):
        dataset[position]
    say(f"whole micro-batches: {50 / (time.perf_counter() - started):.0f} a second, one thread")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    shutil.rmtree(args.folder, ignore_errors=True)
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} cores")
    started = time.perf_counter()
    make_model(args.folder / "model")
    say(f"model made in {time.perf_counter() - started:.0f} s")
    processes = Processes()
    for seconds, frames in ((6.4, 93), (5.0, 73)):
        videos = args.folder / f"videos-{frames}"
        started = time.perf_counter()
        make_folder(videos, seconds, args.count)
        say(f"videos made in {time.perf_counter() - started:.0f} s")
        tiny = Tiny(args.folder / "model", videos)
        path = write_configs(
            args.folder / f"run-{frames}", tiny, videos={"resolution": "480p", "video": {}}
        )
        config = load_config(["--config", str(path)])
        data = load_data_config(path.with_name("databackend.json"))
        models = job.find_models(config)
        started = time.perf_counter()
        state = job.plan(config, data, models, False)
        buckets = Counter(bucket for _, _, bucket, _ in state.samples)
        say(f"plan: {time.perf_counter() - started:.1f} s, buckets {dict(buckets)}")
        started = time.perf_counter()
        job.embed_captions(state, models, processes)
        say(f"captions stage: {time.perf_counter() - started:.1f} s with loading")
        jobs = state.samples
        if frames == 93:
            time_stage(build_stage(config, data, models, compiles=False), jobs[:20], "eager")
        stage = build_stage(config, data, models, compiles=True)
        time_stage(stage, jobs, f"{frames} frames, compiled")
        compare(stage.encoder, data, jobs[0][0])
        time_reads(data)
        files = sorted(data.latent_cache.glob("*.shard"))
        say(json.dumps({"shards": len(files), "bytes": sum(f.stat().st_size for f in files)}))
        processes = Processes()
    time_text(models)


if __name__ == "__main__":
    main()
