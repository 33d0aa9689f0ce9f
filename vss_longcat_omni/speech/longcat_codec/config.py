"""Holds the sizes of LongCat-Audio-Codec; the defaults are those of the released checkpoints.

Source: the YAML files of meituan-longcat/LongCat-Audio-Codec (MIT), `configs/` and
`semantic_tokenizer_general/configs/`. All else is fixed by the architecture.

16 kHz speech -> 16.67 frames a second, each 1 semantic and 3 acoustic codes -> 16 or 24 kHz speech.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SAMPLE_RATE = 16_000  # of what is encoded
HOP = 960  # samples a frame: 60 ms
MAX_FRAMES = 500  # of one piece of speech: the official encoder takes 30 s


@dataclass(frozen=True)
class SemanticConfig:
    """Sizes the transformer whose states are clustered to semantic codes."""

    num_mel_bins: int = 80
    d_model: int = 1280
    nhead: int = 20
    num_encoder_layers: int = 26
    dim_feedforward: int = 5120
    codebook_size: int = 8192


@dataclass(frozen=True)
class QuantizerConfig:
    """Sizes residual codebooks; an acoustic code is a pair of entries, of `codebook_size` each."""

    dim: int = 1024
    num_codebooks: int = 3
    codebook_size: int = 90
    codebook_dim: int = 8


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes LongCatAudioCodec_encoder.pt."""

    width: int = 64
    rates: tuple[int, ...] = (4, 5, 6, 8)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)

    def __post_init__(self) -> None:
        if math.prod(self.rates) != HOP:
            raise ValueError(
                f"rates={self.rates}: their product is to be {HOP}, the samples of a semantic code"
            )
        if self.semantic.d_model % self.semantic.nhead:
            raise ValueError(
                f"d_model={self.semantic.d_model} is to be a multiple of "
                f"nhead={self.semantic.nhead}"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes LongCatAudioCodec_decoder_24k_4codebooks.pt. The 16 kHz decoder is not causal."""

    sample_rate: int = 24_000
    width: int = 1536
    rates: tuple[int, ...] = (8, 6, 6, 5)
    semantic_dim: int = 1280
    semantic_size: int = 8192
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        if self.sample_rate not in (16_000, 24_000):
            raise ValueError(f"sample_rate={self.sample_rate}: decoders speak at 16000 or 24000 Hz")
        hop = self.sample_rate * HOP // SAMPLE_RATE
        if math.prod(self.rates) != hop:
            raise ValueError(
                f"rates={self.rates}: their product is to be {hop}, the samples of a frame at "
                f"{self.sample_rate} Hz"
            )

    @property
    def is_causal(self) -> bool:
        """Say whether a sample depends on no frame after the third to come."""
        return self.sample_rate == 24_000


RELEASED_DECODERS = {
    "16k_4codebooks": DecoderConfig(sample_rate=16_000, rates=(8, 6, 5, 4)),
    "24k_2codebooks": DecoderConfig(quantizer=QuantizerConfig(num_codebooks=1)),
    "24k_4codebooks": DecoderConfig(),
}
