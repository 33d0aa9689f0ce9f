"""Opens speech codecs, which turn an answer's speech into codes that the model learns, and back.

    codec = open_codec("cache/codec")  # fitted by fit_codec.py, or LongCat-Audio-Codec's files
    codes = codec.encode(load_audio(path))  # dataset/prepare.py
    speech = codec.decode(codes)  # generate.py, at codec.sample_rate

Codes are raw: dataset/template.py adds the 32 reserved ids. Codebook 0 is the semantic one,
0..8191; codebooks 1 to 3 are the acoustic ones, 0..8099. A fitted codec's may be smaller.

S samples, N codec frames of 60 ms.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vss_longcat_omni.speech.embedded_codec import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    MelCodec,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from vss_longcat_omni.speech.longcat_codec.codec import LongCatAudioCodec

logger = logging.getLogger(__name__)

ENCODER_NAME = "LongCatAudioCodec_encoder.pt"
CMVN_NAME = "LongCatAudioCodec_encoder_cmvn.npy"
# The best first; the last has one acoustic codebook. The first comes with LongCat-Flash-Omni.
DECODER_NAMES = (
    "LongCatAudioCodec_decoder_24k_4codebooks_aug_sft.pt",
    "LongCatAudioCodec_decoder_24k_4codebooks.pt",
    "LongCatAudioCodec_decoder_16k_4codebooks.pt",
    "LongCatAudioCodec_decoder_24k_2codebooks.pt",
)
# Where they lie in the folder: itself, a copy of the codec's repository, one of the model's.
CHECKPOINT_FOLDERS = (".", "ckpts", "audio_codec")


class SpeechCodec(Protocol):
    """What `embedded_codec.MelCodec` and `LongCatAudioCodec` have in common."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Equal for codecs that give the same codes: part of the names of cached codes."""
        ...

    @property
    def sample_rate(self) -> int:
        """Return the rate of what `decode` returns, Hz."""
        ...

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Return the entries of the four codebooks."""
        ...

    def encode(self, waveform: Tensor) -> Tensor:
        """Encode (S,) float32 in [-1, 1] at 16 kHz: (N, 4) int64, N = ceil(S / 960), on the CPU.

        Raises:
            ValueError: another shape or dtype, an empty clip, or NaN.
        """
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Decode (N, 4) integer codes to (num_samples,) float32 in [-1, 1] on the CPU.

        Raises:
            ValueError: another shape or dtype, or a code outside its codebook.
        """
        ...


def open_codec(spec: str, *, device: torch.device | str = "cpu") -> SpeechCodec:
    """Open the codec in a folder: the embedded one's, or LongCat-Audio-Codec's checkpoints.

    Of the latter a training needs the encoder alone, a generation the decoder alone; with several
    decoders the first of DECODER_NAMES is taken.

    Raises:
        FileNotFoundError: no such folder, or a file of the codec is missing.
        ValueError: not a folder, neither codec in it, or a damaged one.
    """
    folder = Path(spec).expanduser()
    if not folder.exists():
        raise FileNotFoundError(
            f"codec={spec}: no such folder. Fit one to your answers with `python -m "
            "vss_longcat_omni.tools.fit_codec fit data/training --out FOLDER`, or give the folder "
            "of LongCat-Audio-Codec's checkpoints"
        )
    if folder.is_dir() and any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return MelCodec.load(folder, device=device)
    if folder.is_dir():
        for checkpoints in (folder / name for name in CHECKPOINT_FOLDERS):
            encoder, decoder = find_checkpoints(checkpoints)
            if encoder is not None or decoder is not None:
                return _open_longcat(encoder, decoder, device)
    raise ValueError(
        f"codec={spec}: not a folder of a codec. It is to hold {WEIGHTS_FILE} and {CONFIG_FILE} "
        f"(made by `python -m vss_longcat_omni.tools.fit_codec fit`), or {ENCODER_NAME}, "
        f"{CMVN_NAME} and a decoder such as {DECODER_NAMES[1]} "
        "(meituan-longcat/LongCat-Audio-Codec, ckpts/)"
    )


def find_checkpoints(folder: Path) -> tuple[Path | None, Path | None]:
    """Find the encoder and the best decoder right in this folder."""
    encoder = folder / ENCODER_NAME
    decoders = [folder / name for name in DECODER_NAMES if (folder / name).is_file()]
    if len(decoders) > 1:
        logger.info("%s: %d decoders; taking %s", folder, len(decoders), decoders[0].name)
    return encoder if encoder.is_file() else None, decoders[0] if decoders else None


def _open_longcat(
    encoder: Path | None, decoder: Path | None, device: torch.device | str
) -> LongCatAudioCodec:
    from vss_longcat_omni.speech.longcat_codec.codec import LongCatAudioCodec

    codec = LongCatAudioCodec.load(encoder, decoder, device=device)
    # Which codes speech has is the encoder's matter.
    files = (decoder,) if encoder is None else (encoder, encoder.with_name(CMVN_NAME))
    codec.fingerprint = digest_files([path for path in files if path and path.is_file()])
    return codec


def digest_files(paths: Sequence[Path]) -> str:
    """Return the sha256 of their content; some seconds for the 2 GB of the encoder."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
