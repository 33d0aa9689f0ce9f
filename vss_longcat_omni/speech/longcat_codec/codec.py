"""LongCat-Audio-Codec: 16 kHz speech -> codes -> 16 or 24 kHz speech; the door to this package.

    codec = LongCatAudioCodec.load(Path("ckpts/LongCatAudioCodec_encoder.pt"),
                                   Path("ckpts/LongCatAudioCodec_decoder_24k_4codebooks.pt"))
    codes = codec.encode(waveform)  # (N, 4) int64
    speech = codec.decode(codes)  # at codec.sample_rate

A training needs the encoder alone, a generation the decoder alone. Codes are those of the official
`encoder(waveform, 16000)`: a clip is filled up with zeros to whole frames of 60 ms.

T samples at 16 kHz, N = ceil(T / 960) frames, B batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vss_longcat_omni.speech.longcat_codec.config import FRAME_RATE, HOP, MAX_FRAMES, SAMPLE_RATE
from vss_longcat_omni.speech.longcat_codec.loading import load_decoder, load_encoder

if TYPE_CHECKING:
    from pathlib import Path

    from vss_longcat_omni.speech.longcat_codec.config import DecoderConfig, EncoderConfig
    from vss_longcat_omni.speech.longcat_codec.decoder import LongCatDecoder
    from vss_longcat_omni.speech.longcat_codec.encoder import LongCatEncoder

PAD_CODE = -1  # behind the codes of a shorter clip


class LongCatAudioCodec:
    """Either half may be missing; what needs it then raises ValueError."""

    input_rate = SAMPLE_RATE
    frame_rate = FRAME_RATE

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
        """From the released files (see `loading.py`); configs are for others.

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
        """Of what `decode` returns."""
        return self.decoder.config.sample_rate

    @staticmethod
    def num_frames(num_samples: int) -> int:
        """Frames of a clip at 16 kHz."""
        return -(-num_samples // HOP)

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(T,) -> (N, 4), or (B, T) -> (B, N, 4), int64 on the CPU: 1 semantic, 3 acoustic codes.

        Speech of over 30 s is cut where it is quietest. A clip's codes do not depend on the others.

        Args:
            waveform: floating point in [-1, 1], at 16 kHz.
            lengths: (B,) samples of each clip; what lies behind is ignored. Rows of codes behind a
                clip's own are -1.

        Raises:
            ValueError: no encoder, another shape or dtype, an empty clip, or NaN.
        """
        if waveform.dim() == 1 and lengths is None:
            return self.encode(waveform.unsqueeze(0))[0]
        clips = cut_clips(waveform, lengths)
        pieces = [split_at_silences(clip) for clip in clips]
        flat = [piece for group in pieces for piece in group]
        codes: list[Tensor] = []
        for start in range(0, len(flat), len(clips)):  # as many at once as there are clips
            codes += self._encode_pieces(flat[start : start + len(clips)])
        found = iter(codes)
        joined = [torch.cat([next(found) for _ in group]) for group in pieces]
        return pad_sequence(joined, batch_first=True, padding_value=PAD_CODE)

    def _encode_pieces(self, pieces: list[Tensor]) -> list[Tensor]:
        """Each (N, 4), of pieces of at most 30 s."""
        sizes = [self.num_frames(len(piece)) for piece in pieces]
        batch = pad_sequence([piece.float() for piece in pieces], batch_first=True)
        batch = F.pad(batch, (0, max(sizes) * HOP - batch.shape[1])).to(self.device)
        num_codes = None
        if min(sizes) < max(sizes):
            num_codes = torch.tensor(sizes, device=self.device)
        codes = self.encoder(batch, num_codes).cpu()
        return [row[:size] for row, size in zip(codes, sizes, strict=True)]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(N, 4) codes -> (samples,) float32 in [-1, 1] on the CPU, at `sample_rate`.

        Columns beyond the decoder's books are not read; fewer than it has make coarser speech.

        Raises:
            ValueError: no decoder, another shape or dtype, or a code outside its book.
        """
        config = self.decoder.config
        num_books = 1 + config.quantizer.num_codebooks
        if codes.dim() != 2 or codes.shape[1] < 2 or codes.is_floating_point():
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} and {codes.dtype}: expected integers (N, 4), "
                "one semantic code and then the acoustic ones"
            )
        if len(codes) == 0:
            return torch.empty(0)
        codes = codes[:, :num_books].long()
        sizes = [config.semantic_size] + [config.quantizer.codebook_size**2] * (num_books - 1)
        outside = (codes < 0) | (
            codes >= torch.tensor(sizes[: codes.shape[1]], device=codes.device)
        )
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"code {codes[row, column].item()} in row {row}, column {column} is outside "
                f"0..{sizes[column] - 1}: take the 32 reserved ids away, and rows of pads and ends"
            )
        return self.decoder(codes.to(self.device).unsqueeze(0))[0].cpu()


def cut_clips(waveform: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """The rows of (B, T), each as long as `lengths` says; ValueError as `encode`."""
    if waveform.dim() != 2 or not waveform.is_floating_point():
        raise ValueError(
            f"a waveform of shape {tuple(waveform.shape)} and {waveform.dtype}: expected floating "
            "point, (T,), or (B, T) with lengths (B,)"
        )
    num_clips, num_samples = waveform.shape
    sizes = [num_samples] * num_clips if lengths is None else lengths.tolist()
    if len(sizes) != num_clips:
        raise ValueError(f"{len(sizes)} lengths for {num_clips} waveforms")
    clips = []
    for number, (row, size) in enumerate(zip(waveform, sizes, strict=True)):
        if not 0 < size <= num_samples:
            raise ValueError(f"clip {number}: length {size} is outside 1..{num_samples} samples")
        if not row[:size].isfinite().all():
            raise ValueError(f"clip {number}: the waveform holds NaN or infinite samples")
        clips.append(row[:size])
    return clips


def split_at_silences(waveform: Tensor, *, max_frames: int = MAX_FRAMES) -> list[Tensor]:
    """(T,) -> pieces of at most `max_frames` frames; all but the last are whole frames.

    Each cut is between the two quietest neighbours, in the second half of the longest piece that
    is possible, and leaves a quarter of one for the rest.
    """
    num_left = LongCatAudioCodec.num_frames(len(waveform))
    if num_left <= max_frames:
        return [waveform]
    filled = F.pad(waveform, (0, num_left * HOP - len(waveform)))
    power = filled.view(-1, HOP).square().sum(1)
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
