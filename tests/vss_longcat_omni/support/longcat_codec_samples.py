"""A tiny LongCat-Audio-Codec: its sizes, and the recorded weights and results of the official code.

`compare_longcat_codec.py --record` made the record. Weights are in half precision, which is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

from vss_longcat_omni.speech.longcat_codec.codec import LongCatAudioCodec
from vss_longcat_omni.speech.longcat_codec.config import (
    DecoderConfig,
    EncoderConfig,
    QuantizerConfig,
    SemanticConfig,
)

if TYPE_CHECKING:
    from torch import Tensor

RECORD = Path(__file__).parent / "longcat_codec_tiny.safetensors"
QUANTIZER = QuantizerConfig(dim=8, num_codebooks=3, codebook_size=7, codebook_dim=4)
TINY_ENCODER = EncoderConfig(
    width=2,
    quantizer=QUANTIZER,
    semantic=SemanticConfig(8, 8, nhead=2, num_encoder_layers=2, dim_feedforward=16,
                            codebook_size=40),
)  # fmt: skip
TINY_SIZES: dict[str, Any] = {"width": 16, "semantic_dim": 8, "semantic_size": 40}
TINY_DECODERS = {
    "16k": DecoderConfig(16_000, rates=(8, 6, 5, 4), quantizer=QUANTIZER, **TINY_SIZES),
    "24k": DecoderConfig(24_000, rates=(8, 6, 6, 5), quantizer=QUANTIZER, **TINY_SIZES),
}
ENCODER_FILE = "LongCatAudioCodec_encoder.pt"
CMVN_FILE = "LongCatAudioCodec_encoder_cmvn.npy"


def read_record(model: str = "") -> dict[str, Tensor]:
    """The state dict of "encoder", "16k" or "24k"; or all else that is recorded."""
    tensors = load_file(RECORD)
    prefix = f"{model}."
    if model:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    models = ("encoder.", "16k.", "24k.")
    return {k: v for k, v in tensors.items() if not k.startswith(models)}


def write_checkpoints(folder: Path) -> None:
    """Files as the released ones."""
    torch.save(read_record("encoder"), folder / ENCODER_FILE)
    np.save(folder / CMVN_FILE, read_record()["cmvn_stats"].numpy())
    for name in TINY_DECODERS:
        torch.save(read_record(name), folder / f"{name}.pt")


def load_tiny(folder: Path, decoder: str = "24k") -> LongCatAudioCodec:
    return LongCatAudioCodec.load(
        folder / ENCODER_FILE,
        folder / f"{decoder}.pt",
        encoder_config=TINY_ENCODER,
        decoder_config=TINY_DECODERS[decoder],
    )
