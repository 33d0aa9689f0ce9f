"""What these tests run on: tiny real models of the released layout, and a few real videos.

`conftest.py` offers `make_tiny` as the fixture `tiny`. Runs are the user's own commands:
`precompute` calls main in this process, `launch` starts programs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from data.make_videos import make_videos
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel

ROOT = Path(__file__).parents[3]
NUM_VIDEOS = 12
SHAPE = (32, 48)
VIDEO: dict[str, Any] = {"num_frames": 9, "frame_buckets": [9, 5], "target_fps": 15}


@dataclass(frozen=True)
class Tiny:
    model: Path  # vae/, text_encoder/, tokenizer/, dit/
    videos: Path  # NUM_VIDEOS of 96 x 64, one second at 15 frames a second


def make_tiny(folder: Path) -> Tiny:
    make_model(folder / "model")
    make_videos(folder / "videos", count=NUM_VIDEOS, seconds=1.0, show_progress=False)
    return Tiny(folder / "model", folder / "videos")


def make_model(folder: Path, *, seed: int = 0) -> None:
    """Makes the released layout with random weights; the tokenizer knows bytes."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    make_tokenizer(folder / "tokenizer")
    config = UMT5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    make_transformer(folder / "dit")


def make_transformer(folder: Path, **options: Any) -> None:
    """Makes random weights of the released layout; every parameter counts."""
    config = {
        "hidden_size": 64, "depth": 2, "num_heads": 2, "caption_channels": 32,
        "adaln_tembed_dim": 32, "frequency_embedding_size": 64, "text_tokens_zero_pad": True,
    }  # fmt: skip
    model = LongCatVideoTransformer3DModel(**config | options)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.05)
    model.save_pretrained(folder)


def make_tokenizer(folder: Path) -> None:
    """Makes a tokenizer of bytes, with an end mark as UMT5's has."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def write_configs(
    folder: Path,
    tiny: Tiny,
    *,
    videos: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **training: Any,
) -> Path:
    """Writes a training_config.json and its databackend.json in `folder`; caches go below it."""
    data = {
        "id": "videos",
        "type": "local",
        "dataset_type": "video",
        "instance_data_dir": str(tiny.videos),
        "resolution": [list(SHAPE)],
        "cache_dir_vae": str(folder / "vae"),
        "video": VIDEO,
    }
    embeds = {"id": "text", "dataset_type": "text_embeds", "cache_dir": str(folder / "text")}
    data, embeds = data | (videos or {}), embeds | {"write_batch_size": 2} | (text or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "databackend.json").write_text(json.dumps([data, embeds]))
    config = {
        "pretrained_model_name_or_path": str(tiny.model),
        "data_backend_config": "databackend.json",
        "decode_workers": 2,
    }
    path = folder / "training_config.json"
    path.write_text(json.dumps(config | training))
    return path


def precompute(config: Path, *argv: str) -> int:
    """Runs the command's main in this process."""
    from longcat_video_fft.precompute.__main__ import main

    return main(["--config", str(config), *argv])


def command(config: Path, *argv: str, processes: int = 1) -> list[str]:
    """Returns the command, under torchrun where there are several processes."""
    module = ["-m", "longcat_video_fft.precompute", "--config", str(config), *argv]
    if processes == 1:
        return [sys.executable, *module]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, "--standalone", *module]


def launch_env(**env: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **env}


def launch(argv: list[str], *, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end."""
    return subprocess.run(
        argv, cwd=ROOT, env=launch_env(), capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


def open_folder(folder: Path) -> Any:
    """Opens the cache in a folder."""
    from longcat_video_fft.dataset.cache import TensorCache
    from longcat_video_fft.storage.storage import LocalStorage

    return TensorCache(LocalStorage(folder))


def contents(folder: Path) -> dict[str, tuple[str, str, int, bytes]]:
    """Returns every tensor of a cache by its id: bucket, dtype, version and bytes."""
    from longcat_video_fft.dataset.cache import to_bytes

    cache = open_folder(folder)
    assert all(len(entries) == 1 for entries in cache.entries.values())
    return {e.id: (e.bucket, e.dtype, e.version, to_bytes(cache.read(e))) for e in cache}
