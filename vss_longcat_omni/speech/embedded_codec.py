"""The embedded speech codec, once fitted: residual k-means over log-mel, spoken by Griffin-Lim.

`fit_codec.py` fits it by the k-means below and writes it, `codec.py` opens it. In the form of
LongCat-Audio-Codec: 16 kHz speech, frames of 60 ms, four codes each. A frame's six log-mel frames
are one vector, written in the speech's own principal components; book 0 holds its nearest centre,
books 1 to 3 what is left each time. Griffin-Lim speaks the sum of the four.

PocketSphinx, with a grammar of 177 sentences, reads back right 95 % of held-out recordings by
espeak-ng (given some room noise), 95 % of them through a codec fitted to 12 minutes of the same
voices, and 95 % through one fitted to other voices:
tests/benchmarks/vss_longcat_omni/measure_codec.py.

The folder: codec.safetensors (mean, basis, books.0 to books.3) and codec.json, which tells of it.

S samples at 16 kHz, N frames, D components, K entries of a book.
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
from tqdm import tqdm

from vss_longcat_omni.speech import log_mel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SAMPLE_RATE = log_mel.SAMPLE_RATE
FRAME_SAMPLES = 960  # 60 ms, as LongCat-Audio-Codec
FRAME_WIDTH = FRAME_SAMPLES // log_mel.HOP * log_mel.NUM_MELS
MAX_BOOK_SIZES = (8192, 8100, 8100, 8100)  # the model's ids end there
NUM_BOOKS = len(MAX_BOOK_SIZES)

WEIGHTS_FILE = "codec.safetensors"
CONFIG_FILE = "codec.json"
FORMAT = "vss_longcat_omni mel codec 1"

ASSIGN_ROWS = 16_384  # rows of the distance matrix made at a time
MAX_ROUNDS = 30
MIN_GAIN = 1e-3  # a round that lowers the error by less is the last


class MelCodec:
    """See `codec.SpeechCodec`. Encoding is greedy, book by book; decoding takes 0.05 s a second."""

    name = "mel"
    sample_rate = SAMPLE_RATE
    frame_rate = SAMPLE_RATE / FRAME_SAMPLES

    def __init__(
        self,
        mean: Tensor,
        basis: Tensor,
        books: Sequence[Tensor],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """mean (FRAME_WIDTH,), basis (FRAME_WIDTH, D) of orthonormal columns, books (K, D)."""
        self.fingerprint = digest_tensors([mean, basis, *books])
        self.device = torch.device(device)
        self.mean, self.basis = mean.to(self.device), basis.to(self.device)
        self.books = [book.to(self.device) for book in books]
        self.book_sizes = tuple(len(book) for book in books)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> MelCodec:
        """What `fit_codec` wrote.

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
        names = ["mean", "basis", *(f"books.{number}" for number in range(NUM_BOOKS))]
        if sorted(tensors) != sorted(names):
            raise ValueError(f"{path}: holds {sorted(tensors)} instead of {names}: fit it again")
        mean, basis, *books = (tensors[name].float() for name in names)
        _check_tensors(path, mean, basis, books)
        return cls(mean, basis, books, device=device)

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Writes a folder that appears whole or not at all; `facts` are further lines of its json.

        Raises:
            ValueError: it exists already.
        """
        check_is_new(folder)
        tensors = {"mean": self.mean, "basis": self.basis}
        tensors |= {f"books.{number}": book for number, book in enumerate(self.books)}
        config = {
            "format": FORMAT,
            "frames": log_mel.IDENTITY,
            "sample_rate": SAMPLE_RATE,
            "frame_samples": FRAME_SAMPLES,
            "book_sizes": list(self.book_sizes),
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
        """(S,) floating point in [-1, 1] -> (ceil(S / 960), 4) int64 codes on the CPU.

        Raises:
            ValueError: another shape or dtype, an empty clip, or NaN.
        """
        rest = (compute_frames(waveform.to(self.device)) - self.mean) @ self.basis
        codes = []
        for book in self.books:
            codes.append(assign(rest, book))
            rest = rest - book[codes[-1]]
        return torch.stack(codes, 1).cpu()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(N, 4) integer codes -> (960 N,) float32 in [-1, 1] on the CPU.

        Raises:
            ValueError: another shape or dtype, or a code outside its book.
        """
        self._validate_codes(codes)
        if len(codes) == 0:
            return torch.empty(0)
        columns = codes.to(self.device).long().unbind(1)
        sums = sum(
            (book[ids] for book, ids in zip(self.books, columns, strict=True)), torch.zeros(())
        )
        frames = self.mean + sums @ self.basis.T  # (N, FRAME_WIDTH)
        mel = frames.view(-1, log_mel.NUM_MELS)
        waveform = log_mel.griffin_lim(log_mel.invert_log_mel(mel))
        return waveform.clamp(-1, 1).cpu()

    def _validate_codes(self, codes: Tensor) -> None:
        if codes.dim() != 2 or codes.shape[1] != NUM_BOOKS or codes.is_floating_point():
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} and {codes.dtype}: expected integers "
                f"(N, {NUM_BOOKS})"
            )
        outside = (codes < 0) | (codes >= torch.tensor(self.book_sizes, device=codes.device))
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"code {codes[row, column].item()} in row {row}, column {column} is outside "
                f"0..{self.book_sizes[column] - 1}: take the 32 reserved ids away, and rows of "
                "pads and ends; or these codes are of another codec"
            )


def compute_frames(waveform: Tensor) -> Tensor:
    """(S,) -> (ceil(S / 960), FRAME_WIDTH) log-mel; the last frame is filled up with zeros.

    Raises:
        ValueError: another shape or dtype, an empty clip, or NaN.
    """
    if waveform.dim() != 1 or not waveform.is_floating_point():
        raise ValueError(
            f"a waveform of shape {tuple(waveform.shape)} and {waveform.dtype}: expected floating "
            "point, (S,)"
        )
    if len(waveform) == 0 or not waveform.isfinite().all():
        raise ValueError("the waveform is empty, or holds NaN or infinite samples")
    filled = F.pad(waveform.float(), (0, -len(waveform) % FRAME_SAMPLES))
    return log_mel.compute_log_mel(filled).view(-1, FRAME_WIDTH)


def assign(points: Tensor, centroids: Tensor) -> Tensor:
    """(N, D), (K, D) -> (N,) index of the nearest centre.

    ||x - c||^2 without its ||x||^2, which is the same for all centres.
    """
    offsets = centroids.square().sum(1)
    rows = [
        torch.addmm(offsets, part, centroids.T, alpha=-2).argmin(1)
        for part in points.split(ASSIGN_ROWS)
    ]
    return torch.cat(rows)


def fit_kmeans(
    points: Tensor, num_centroids: int, *, seed: int = 0, label: str = "k-means"
) -> Tensor:
    """(N, D) -> (num_centroids, D) by Lloyd's iteration from k-means++ starts, which `seed` fixes.

    Raises:
        ValueError: fewer points than centres.
    """
    if len(points) < num_centroids:
        raise ValueError(f"{len(points)} points cannot make {num_centroids} centres")
    centroids = _spread_starts(points, num_centroids, torch.Generator().manual_seed(seed))
    last_error = float("inf")
    for _ in tqdm(range(MAX_ROUNDS), desc=f"{label}, {num_centroids} entries", unit="round"):
        ids = assign(points, centroids)
        distances = (points - centroids[ids]).square().sum(1)
        counts = torch.bincount(ids, minlength=num_centroids)
        sums = torch.zeros_like(centroids).index_add_(0, ids, points)
        centroids = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        # A centre that lost all its points goes where the fit is worst.
        centroids[empty] = points[distances.topk(len(empty)).indices]
        error = float(distances.double().mean())
        if not len(empty) and error > last_error * (1 - MIN_GAIN):
            break
        last_error = error
    return centroids


def check_is_new(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder}: exists already; delete it, or name another folder")


def digest_tensors(tensors: Sequence[Tensor]) -> str:
    """sha256 of their values."""
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


def _check_tensors(path: Path, mean: Tensor, basis: Tensor, books: Sequence[Tensor]) -> None:
    """Raises ValueError unless the shapes fit together, and all is finite."""
    shapes = [tuple(tensor.shape) for tensor in (mean, basis, *books)]
    width = basis.shape[-1]
    sizes = [shape[0] if len(shape) == 2 else 0 for shape in shapes[2:]]
    wanted = [(FRAME_WIDTH,), (FRAME_WIDTH, width), *((size, width) for size in sizes)]
    fits = all(0 < size <= most for size, most in zip(sizes, MAX_BOOK_SIZES, strict=True))
    if shapes != wanted or not fits:
        raise ValueError(
            f"{path}: mean, basis and books of shapes {shapes} do not make a codec of frames "
            f"{FRAME_WIDTH} wide and books up to {list(MAX_BOOK_SIZES)}: fit it again"
        )
    if not all(tensor.isfinite().all() for tensor in (mean, basis, *books)):
        raise ValueError(f"{path}: holds NaN or infinite values: fit it again")


def _spread_starts(points: Tensor, num_starts: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each start is drawn in proportion to the squared
    distance from the nearest one so far. Plain draws would mostly be silence."""
    norms = points.square().sum(1)
    starts = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.full_like(norms, torch.inf)
    while True:
        distances = norms + norms[starts[-1]] - 2 * points @ points[starts[-1]]
        nearest = torch.minimum(nearest, distances.clamp(min=0))
        nearest[starts[-1]] = 0  # exactly, so that it is not drawn again
        if len(starts) == num_starts:
            return points[starts]
        edges = nearest.double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * edges[-1]
        starts.append(int(torch.searchsorted(edges, draw, right=True).clamp(max=len(points) - 1)))
