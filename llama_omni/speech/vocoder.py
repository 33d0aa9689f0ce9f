"""Makes speech of units by the unit HiFi-GAN of the paper, else by the embedded voice.

Last in the data flow, used by `generate.py` and `evaluate.py` through `load_voice`. The networks
are in `code_hifigan.py` and `mel_voice.py`. The released vocoder is the file at VOCODER_URL, which
needs its config.json beside it (on the hub: VOCODER_HUB_ID); nothing is downloaded here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from llama_omni.speech.code_hifigan import CodeHiFiGAN
from llama_omni.speech.kmeans import read_kmeans
from llama_omni.speech.mel_voice import MelVoice

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path


VOCODER_URL = (
    "https://dl.fbaipublicfiles.com/fairseq/speech_to_speech/vocoder/code_hifigan/"
    "mhubert_vp_en_es_fr_it3_400k_layer11_km1000_lj/g_00500000"
)
VOCODER_HUB_ID = "facebook/unit_hifigan_mhubert_vp_en_es_fr_it3_400k_layer11_km1000_lj_dur"


class Voice(Protocol):
    """Turns unit ids, deduplicated, into speech."""

    sample_rate: int
    num_units: int

    def __call__(self, units: Sequence[int]) -> Tensor:
        """Returns (num_samples,) float32 on the CPU; ValueError for an unknown unit."""
        ...

    def stream(self, chunks: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Yields pieces of waveform as units arrive; together they are the whole."""
        ...


def load_voice(
    *,
    vocoder_path: Path | None,
    kmeans_path: Path | None,
    device: torch.device | str = "cpu",
) -> Voice:
    """Loads the HiFi-GAN at `vocoder_path` when given, else the voice of log-mel centroids.

    Args:
        vocoder_path: the checkpoint with config.json beside it, or the folder of both.
        kmeans_path: the k-means that the units come from.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: neither given, files that do not fit, or a vocoder of another k-means.
    """
    if vocoder_path is not None:
        vocoder = load_vocoder(vocoder_path).to(device)
        if kmeans_path is not None:
            num_units = read_kmeans(kmeans_path).num_units
            if num_units != vocoder.num_units:
                raise ValueError(
                    f"{vocoder_path}: speaks {vocoder.num_units} units, but {kmeans_path} makes "
                    f"{num_units}. Use the vocoder that was trained on these units."
                )
        return vocoder
    if kmeans_path is None:
        raise ValueError("a voice needs a vocoder, or the k-means file of log-mel units")
    kmeans = read_kmeans(kmeans_path)
    if kmeans.features != "log_mel":
        raise ValueError(
            f"{kmeans_path}: units of mHuBERT need a vocoder (give its path or {VOCODER_HUB_ID}); "
            "the embedded voice speaks log-mel units alone"
        )
    return MelVoice(kmeans)


def load_vocoder(path: Path) -> CodeHiFiGAN:
    """Loads a vocoder for evaluation, weight norm fused, from a checkpoint or the folder of one.

    Raises:
        FileNotFoundError: no checkpoint or no config.json.
        ValueError: not a unit HiFi-GAN, or weights of another shape.
    """
    checkpoint = _find_checkpoint(path)
    config_path = checkpoint.with_name("config.json")
    if not config_path.is_file():
        raise FileNotFoundError(f"{config_path}: the vocoder's config.json is to be beside it")
    try:
        vocoder = CodeHiFiGAN(json.loads(config_path.read_text("utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config_path}: {error}") from error
    state = _read_state(checkpoint)
    if not any(key.endswith("weight_g") for key in state):
        vocoder.fuse_weight_norm()  # the file was saved after that
    try:
        vocoder.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{checkpoint}: the weights do not fit {config_path}: {reason}") from error
    vocoder.fuse_weight_norm()
    return vocoder.eval().requires_grad_(False)


def _find_checkpoint(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such vocoder checkpoint or folder")
    for pattern in ("g_*", "*.safetensors", "*.pt", "*.bin"):
        found = sorted(file for file in path.glob(pattern) if file.is_file())
        if found:  # g_00500000: the last is the most trained
            return found[-1]
    raise FileNotFoundError(
        f"{path}: holds no vocoder checkpoint (g_*, *.safetensors, *.pt, *.bin)"
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("generator", state)
    except Exception as error:  # a damaged or foreign file may fail in any way
        raise ValueError(f"{path}: not readable as a vocoder checkpoint: {error}") from error
    # How today's PyTorch spells the two parts of weight norm.
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        state = {k.replace(f"parametrizations.weight.{new}", old): v for k, v in state.items()}
    return state
