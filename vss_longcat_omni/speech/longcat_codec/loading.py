"""Reads the released checkpoints: flat state dicts under the names of `encoder.py`, `decoder.py`.

    ckpts/LongCatAudioCodec_encoder.pt and LongCatAudioCodec_encoder_cmvn.npy
    ckpts/LongCatAudioCodec_decoder_{16k_4codebooks,24k_2codebooks,24k_4codebooks}.pt

Nothing is downloaded here, and no pickled code runs. The official loader calls torch.load with its
defaults too, by which since torch 2.6 whatever is not a tensor is an error.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vss_longcat_omni.speech.longcat_codec.config import (
    RELEASED_DECODERS,
    DecoderConfig,
    EncoderConfig,
)
from vss_longcat_omni.speech.longcat_codec.decoder import LongCatDecoder
from vss_longcat_omni.speech.longcat_codec.encoder import LongCatEncoder
from vss_longcat_omni.speech.longcat_codec.features import FeatureExtractor, read_cmvn_stats

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

CMVN_NAME = "LongCatAudioCodec_encoder_cmvn.npy"
FEATURES = "semantic_tokenizer.feature_extractor."
# Of the two layouts of a decoder, only the causal one has a layer 7.
CAUSAL_KEY = "decoder.model.7.bias"


def load_encoder(
    path: Path, *, cmvn_file: Path | None = None, config: EncoderConfig | None = None
) -> LongCatEncoder:
    """Load the encoder in evaluation mode, on the CPU, float32.

    Args:
        cmvn_file: statistics of the features; by default beside the checkpoint, under the released
            name. Not read when the checkpoint holds them.
        config: the released one by default.

    Raises:
        FileNotFoundError: no checkpoint, or no statistics.
        ValueError: not such a checkpoint.
    """
    state = read_state(path)
    config = config or EncoderConfig()
    with torch.device("meta"):
        encoder = LongCatEncoder(config)
    num_mel_bins = config.semantic.num_mel_bins
    features = FeatureExtractor(num_mel_bins)  # computed, unless the checkpoint has it
    encoder.semantic_tokenizer.feature_extractor = features
    # The official loader passes over names that it does not know, here alone.
    unknown = set_state(encoder, state, path, may_lack=FEATURES)
    if not any(key.startswith(f"{FEATURES}cmvn.") for key in state):
        stats_path = cmvn_file or path.with_name(CMVN_NAME)
        features.cmvn.set_statistics(read_cmvn_stats(stats_path, num_mel_bins))
    if unknown:
        logger.info("%s: %d tensors are not of the encoder: %s", path, len(unknown), unknown[:3])
    return encoder.eval().requires_grad_(False)


def load_decoder(path: Path, *, config: DecoderConfig | None = None) -> LongCatDecoder:
    """Load the decoder in evaluation mode, on the CPU, float32; errors as `load_encoder`.

    Args:
        config: by default the released one that the checkpoint is of.
    """
    state = read_state(path)
    with torch.device("meta"):
        decoder = LongCatDecoder(config or find_decoder_config(state))
    unknown = set_state(decoder, state, path)
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} tensors are not of a LongCat-Audio-Codec decoder, such as "
            f"{unknown[0]}: wrong file"
        )
    return decoder.eval().requires_grad_(False)


def find_decoder_config(state: dict[str, Tensor]) -> DecoderConfig:
    """Find the released decoder of this layout, with as many codebooks as the state dict has."""
    released = RELEASED_DECODERS["24k_4codebooks" if CAUSAL_KEY in state else "16k_4codebooks"]
    num_codebooks = sum(key.endswith(".codebook_a.weight") for key in state)
    quantizer = replace(released.quantizer, num_codebooks=max(1, num_codebooks))
    return replace(released, quantizer=quantizer)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict, on the CPU, its floating-point tensors as float32.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, more than tensors in it, or not flat.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; the released ones are on the hub: "
            "meituan-longcat/LongCat-Audio-Codec, ckpts/"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file may fail in any way
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path}: not readable as a file of tensors (nothing else is read from a checkpoint): "
            f"{reason}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        found = list(state)[:3] if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{path}: holds {found} instead of named tensors; save the state dict alone"
        )
    return {key: v.float() if v.is_floating_point() else v for key, v in state.items()}


def set_state(
    model: nn.Module, state: dict[str, Tensor], path: Path, *, may_lack: str = "\0"
) -> list[str]:
    """Give the tensors to `model`; return the names that it has no place for.

    Raises ValueError where tensors are missing (but those that begin with `may_lack`) or have
    another shape.
    """
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in own if name not in state and not name.startswith(may_lack)]
    misshaped = [
        f"{name} is {tuple(state[name].shape)} instead of {shape}"
        for name, shape in own.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or misshaped:
        problems = [f"{len(missing)} tensors are missing, such as {missing[0]}"] if missing else []
        problems += misshaped[:3]
        raise ValueError(
            f"{path}: does not fit {type(model).__name__}: {'; '.join(problems)}. Use a checkpoint "
            "of meituan-longcat/LongCat-Audio-Codec, or give the config that it was made with."
        )
    model.load_state_dict(state, strict=False, assign=True)
    return [name for name in state if name not in own]
