"""LongCat-Audio-Codec: 16 kHz speech -> codes -> 16 or 24 kHz speech; the door to this package.

    codec = LongCatAudioCodec.load(Path("ckpts/LongCatAudioCodec_encoder.pt"),
                                   Path("ckpts/LongCatAudioCodec_decoder_24k_4codebooks.pt"))
    codes = codec.encode(waveform)  # (N, 4) int64
    speech = codec.decode(codes)  # at codec.sample_rate

A training needs the encoder alone, a generation the decoder alone. Codes are those of the official
`encoder(waveform, 16000)`: a clip is padded with zeros to whole frames of 60 ms.

T samples at 16 kHz, N = ceil(T / 960) frames, B batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vss_longcat_omni.speech.embedded_codec import (
    MAX_CODEBOOK_SIZES,
    check_range,
    check_waveform,
)
from vss_longcat_omni.speech.longcat_codec.config import HOP, MAX_FRAMES
from vss_longcat_omni.speech.longcat_codec.loading import load_decoder, load_encoder

if TYPE_CHECKING:
    from pathlib import Path

    from vss_longcat_omni.speech.longcat_codec.config import DecoderConfig, EncoderConfig
    from vss_longcat_omni.speech.longcat_codec.decoder import LongCatDecoder
    from vss_longcat_omni.speech.longcat_codec.encoder import LongCatEncoder


class LongCatAudioCodec:
    """A `codec.SpeechCodec`; either half may be missing, and what needs it raises ValueError."""

    name = "longcat"
    codebook_sizes = MAX_CODEBOOK_SIZES
    fingerprint = ""  # codec.open_codec sets it, from the files

    def __init__(
        self,
        encoder: LongCatEncoder | None,
        decoder: LongCatDecoder | None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self._encoder = encoder and encoder.to(self.device)
        self._decoder = decoder and decoder.to(self.device)

    @classmethod
    def load(
        cls,
        encoder_checkpoint: Path | None,
        decoder_checkpoint: Path | None,
        *,
        cmvn_file: Path | None = None,
        device: torch.device | str = "cpu",
        encoder_config: EncoderConfig | None = None,
        decoder_config: DecoderConfig | None = None,
    ) -> LongCatAudioCodec:
        """Load the released files (see `loading.py`); configs are for others.

        Raises:
            FileNotFoundError: no such checkpoint, or no statistics of the features.
            ValueError: neither checkpoint is given, or one is of another shape.
        """
        if encoder_checkpoint is None and decoder_checkpoint is None:
            raise ValueError("give an encoder checkpoint, a decoder checkpoint, or both")
        encoder = decoder = None
        if encoder_checkpoint is not None:
            encoder = load_encoder(encoder_checkpoint, cmvn_file=cmvn_file, config=encoder_config)
        if decoder_checkpoint is not None:
            decoder = load_decoder(decoder_checkpoint, config=decoder_config)
        return cls(encoder, decoder, device=device)

    @property
    def encoder(self) -> LongCatEncoder:
        if self._encoder is None:
            raise ValueError("this codec was loaded without an encoder checkpoint: it only decodes")
        return self._encoder

    @property
    def decoder(self) -> LongCatDecoder:
        if self._decoder is None:
            raise ValueError("this codec was loaded without a decoder checkpoint: it only encodes")
        return self._decoder

    @property
    def sample_rate(self) -> int:
        """Return the rate of what `decode` returns."""
        return self.decoder.config.sample_rate

    @staticmethod
    def num_frames(num_samples: int) -> int:
        """Count the frames of a clip at 16 kHz."""
        return -(-num_samples // HOP)

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """Encode (T,) floats in [-1, 1] at 16 kHz: (N, 4) int64, 1 semantic, 3 acoustic codes.

        They are on the CPU. Speech of over 30 s is cut where it is quietest.

        Raises:
            ValueError: no encoder, another shape or dtype, an empty clip, or NaN.
        """
        check_waveform(waveform)
        padded = F.pad(waveform.float(), (0, -len(waveform) % HOP)).to(self.device)
        return torch.cat(
            [self.encoder(piece[None])[0].cpu() for piece in split_at_silences(padded)]
        )

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode (N, 4) codes to (samples,) float32 in [-1, 1] on the CPU, at `sample_rate`.

        Columns beyond the decoder's codebooks are not read; fewer than it has make coarser speech.

        Raises:
            ValueError: no decoder, another shape or dtype, or a code outside its codebook.
        """
        config = self.decoder.config
        num_codebooks = 1 + config.quantizer.num_codebooks
        if codes.dim() != 2 or codes.shape[1] < 2 or codes.is_floating_point():
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} and {codes.dtype}: expected integers (N, 4), "
                "one semantic code and then the acoustic ones"
            )
        if len(codes) == 0:
            return torch.empty(0)
        codes = codes[:, :num_codebooks].long()
        sizes = [config.semantic_size] + [config.quantizer.codebook_size**2] * (num_codebooks - 1)
        check_range(codes, sizes)
        return self.decoder(codes.to(self.device).unsqueeze(0))[0].cpu()


def split_at_silences(waveform: Tensor, *, max_frames: int = MAX_FRAMES) -> list[Tensor]:
    """Split (T,) to pieces of at most `max_frames` frames; all but the last are whole frames.

    Each cut is between the two quietest neighbors, in the second half of the longest piece that
    is possible, and leaves a quarter of one for the rest.
    """
    num_left = LongCatAudioCodec.num_frames(len(waveform))
    if num_left <= max_frames:
        return [waveform]
    padded = F.pad(waveform, (0, num_left * HOP - len(waveform)))
    power = padded.view(-1, HOP).square().sum(1)
    around = (power[:-1] + power[1:]).cpu()  # around[i]: a cut behind frame i
    sizes: list[int] = []
    start = 0
    while num_left > max_frames:
        shortest = max_frames // 2
        longest = min(max_frames, num_left - max_frames // 4)
        size = shortest + int(around[start + shortest - 1 : start + longest].argmin())
        sizes.append(size)
        start, num_left = start + size, num_left - size
    return list(waveform.split([size * HOP for size in sizes] + [len(waveform) - start * HOP]))
