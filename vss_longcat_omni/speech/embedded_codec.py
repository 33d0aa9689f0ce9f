"""The embedded speech codec, once fitted: residual k-means over log-mel, and Griffin-Lim.

`fit_codec.py` fits and writes it, `codec.py` opens it. It has the form of LongCat-Audio-Codec:
16 kHz speech, frames of 60 ms, four codes each. A frame's six log-mel frames are one vector,
written in the speech's own principal components; codebook 0 holds its nearest centroid, codebooks 1
to 3 what is left each time. Griffin-Lim makes speech of the sum of the four.

PocketSphinx, with a grammar of 177 sentences, transcribes right 95 % of held-out recordings by
espeak-ng (given some room noise), 95 % of them through a codec fitted to 12 minutes of the same
voices, and 95 % through one fitted to other voices:
tests/benchmarks/vss_longcat_omni/measure_codec.py.

The folder: codec.safetensors (mean, basis, books.0 to books.3) and codec.json, which describes it.

S samples at 16 kHz, N frames, D components, K entries of a codebook.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vss_longcat_omni.speech import log_mel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SAMPLE_RATE = log_mel.SAMPLE_RATE
FRAME_SAMPLES = 960  # 60 ms, as LongCat-Audio-Codec
FRAME_WIDTH = FRAME_SAMPLES // log_mel.HOP * log_mel.NUM_MELS
MAX_CODEBOOK_SIZES = (8192, 8100, 8100, 8100)  # the model's ids end there
NUM_CODEBOOKS = len(MAX_CODEBOOK_SIZES)

WEIGHTS_FILE = "codec.safetensors"
CONFIG_FILE = "codec.json"
FORMAT = "vss_longcat_omni mel codec 1"

ASSIGN_POINTS = 16_384  # rows of the distance matrix made at a time


class MelCodec:
    """A `codec.SpeechCodec`. Encoding is greedy, codebook by codebook; decoding takes 0.05 s a
    second."""

    name = "mel"
    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        mean: Tensor,
        basis: Tensor,
        codebooks: Sequence[Tensor],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take mean (FRAME_WIDTH,), basis (FRAME_WIDTH, D), orthonormal, codebooks (K, D)."""
        self.fingerprint = digest_tensors([mean, basis, *codebooks])
        self.device = torch.device(device)
        self.mean, self.basis = mean.to(self.device), basis.to(self.device)
        self.codebooks = [codebook.to(self.device) for codebook in codebooks]
        self.codebook_sizes = tuple(map(len, codebooks))

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> MelCodec:
        """Load what `fit_codec` wrote.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: one is damaged, of another kind, or of frames made otherwise.
        """
        _check_config(folder / CONFIG_FILE)
        path = folder / WEIGHTS_FILE
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: missing; fit the codec again") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: not readable as safetensors: {error}") from error
        names = ["mean", "basis", *(f"books.{number}" for number in range(NUM_CODEBOOKS))]
        if sorted(tensors) != sorted(names):
            raise ValueError(f"{path}: holds {sorted(tensors)} instead of {names}: fit it again")
        mean, basis, *codebooks = (tensors[name].float() for name in names)
        _check_tensors(path, mean, basis, codebooks)
        return cls(mean, basis, codebooks, device=device)

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write a folder atomically; `facts` are further lines of its json.

        Raises:
            ValueError: it exists already.
        """
        check_is_new(folder)
        tensors = {"mean": self.mean, "basis": self.basis}
        tensors |= {f"books.{number}": entries for number, entries in enumerate(self.codebooks)}
        config = {
            "format": FORMAT,
            "frames": log_mel.IDENTITY,
            "sample_rate": SAMPLE_RATE,
            "frame_samples": FRAME_SAMPLES,
            "book_sizes": list(self.codebook_sizes),
        }
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / WEIGHTS_FILE)
        text = json.dumps(config | facts, indent=2)
        (partial / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        partial.rename(folder)

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """Encode (S,) floating point in [-1, 1] to (ceil(S / 960), 4) int64 codes on the CPU.

        Raises:
            ValueError: another shape or dtype, an empty clip, or NaN.
        """
        rest = (compute_frames(waveform.to(self.device)) - self.mean) @ self.basis
        codes = []
        for codebook in self.codebooks:
            codes.append(assign(rest, codebook))
            rest = rest - codebook[codes[-1]]
        return torch.stack(codes, 1).cpu()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode (N, 4) integer codes to (960 N,) float32 in [-1, 1] on the CPU.

        Raises:
            ValueError: another shape or dtype, or a code outside its codebook.
        """
        if codes.dim() != 2 or codes.shape[1] != NUM_CODEBOOKS or codes.is_floating_point():
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} and {codes.dtype}: expected integers "
                f"(N, {NUM_CODEBOOKS})"
            )
        check_range(codes, self.codebook_sizes)
        if len(codes) == 0:
            return torch.empty(0)
        pairs = zip(self.codebooks, codes.to(self.device).long().unbind(1), strict=True)
        sums = sum((codebook[ids] for codebook, ids in pairs), torch.zeros(()))
        frames = self.mean + sums @ self.basis.T  # (N, FRAME_WIDTH)
        mel = frames.view(-1, log_mel.NUM_MELS)
        waveform = log_mel.griffin_lim(log_mel.invert_log_mel(mel))
        return waveform.clamp(-1, 1).cpu()


def check_waveform(waveform: Tensor) -> None:
    """Raise ValueError for another shape or dtype than (S,) floats, an empty clip, or NaN."""
    if waveform.dim() != 1 or not waveform.is_floating_point():
        raise ValueError(
            f"a waveform of shape {tuple(waveform.shape)} and {waveform.dtype}: expected floating "
            "point, (S,)"
        )
    if len(waveform) == 0 or not waveform.isfinite().all():
        raise ValueError("the waveform is empty, or holds NaN or infinite samples")


def check_range(codes: Tensor, sizes: Sequence[int]) -> None:
    """Raise ValueError for a code of (N, Q) outside its codebook, of so many entries."""
    outside = (codes < 0) | (codes >= torch.tensor(sizes[: codes.shape[1]], device=codes.device))
    if outside.any():
        frame, number = outside.nonzero()[0].tolist()
        raise ValueError(
            f"code {codes[frame, number].item()} in frame {frame}, codebook {number} is outside "
            f"0..{sizes[number] - 1}: take the 32 reserved ids away, and frames of pads and ends; "
            "or these codes are of another codec"
        )


def compute_frames(waveform: Tensor) -> Tensor:
    """Compute (ceil(S / 960), FRAME_WIDTH) log-mel from (S,); zeros pad the last frame.

    Raises:
        ValueError: another shape or dtype, an empty clip, or NaN.
    """
    check_waveform(waveform)
    padded = F.pad(waveform.float(), (0, -len(waveform) % FRAME_SAMPLES))
    return log_mel.compute_log_mel(padded).view(-1, FRAME_WIDTH)


def assign(points: Tensor, centroids: Tensor) -> Tensor:
    """Return for (N, D), (K, D) the (N,) index of the nearest centroid.

    ||x - c||^2 is taken without its ||x||^2, which is the same for all centroids.
    """
    offsets = centroids.square().sum(1)
    parts = points.split(ASSIGN_POINTS)
    return torch.cat([torch.addmm(offsets, p, centroids.T, alpha=-2).argmin(1) for p in parts])


def check_is_new(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder}: exists already; delete it, or name another folder")


def digest_tensors(tensors: Sequence[Tensor]) -> str:
    """Return the sha256 of their values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; fit the codec again") from None
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format={found!r} instead of {FORMAT!r}: not an embedded codec")
    if config.get("frames") != log_mel.IDENTITY:
        raise ValueError(
            f"{path}: fitted over {config.get('frames')!r}, while frames are now made as "
            f"{log_mel.IDENTITY!r}: fit it again"
        )


def _check_tensors(path: Path, mean: Tensor, basis: Tensor, codebooks: Sequence[Tensor]) -> None:
    """Raise ValueError unless the shapes fit together, and all is finite."""
    shapes = [tuple(tensor.shape) for tensor in (mean, basis, *codebooks)]
    width = basis.shape[-1]
    sizes = [shape[0] if len(shape) == 2 else 0 for shape in shapes[2:]]
    wanted = [(FRAME_WIDTH,), (FRAME_WIDTH, width), *((size, width) for size in sizes)]
    fits = all(0 < size <= most for size, most in zip(sizes, MAX_CODEBOOK_SIZES, strict=True))
    if shapes != wanted or not fits:
        raise ValueError(
            f"{path}: mean, basis and codebooks of shapes {shapes} do not make a codec of frames "
            f"{FRAME_WIDTH} wide and codebooks up to {list(MAX_CODEBOOK_SIZES)}: fit it again"
        )
    if not all(tensor.isfinite().all() for tensor in (mean, basis, *codebooks)):
        raise ValueError(f"{path}: holds NaN or infinite values: fit it again")
