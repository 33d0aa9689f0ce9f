"""Turns a 16 kHz waveform into what the audio encoder takes: 1200 values every 80 ms.

Second step of the sound in (audio.py -> here -> model/audio_encoder.py): log mel energies, deltas,
normalization by the model's statistics, and every 8th frame joined with its neighbors. Order of
operations and precision follow data/audio_feature.py of meituan-longcat/LongCat-Flash-Omni. Each
clip is computed by itself, so nothing depends on the batch.

F frames (10 ms), N tokens (80 ms), M mel bins, D values a frame: M * (delta_order + 1).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.compliance import kaldi

from vss_longcat_omni.media.cmvn import (
    CMVN_NAME,
    Cmvn,
    read_kaldi_matrix,
    write_kaldi_matrix,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)

CONFIG_NAME = "preprocessor_config.json"
SAMPLE_SCALE = 32768  # the statistics are those of 16-bit samples


def option(section: str, default: Any) -> Any:
    return field(default=default, metadata={"section": section})


def check_type(entry: dataclasses.Field[Any], value: Any) -> None:
    kind = str(entry.type)  # such as "int | None"
    if value is None and "None" in kind:
        return
    allowed = {"bool": (bool,), "float": (int, float)}.get(kind, (int,))
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
        name = f"{entry.metadata['section']}.{entry.name}"
        raise ValueError(f"{CONFIG_NAME}: {name}={value!r} must be of type {kind}")


@dataclass(frozen=True, kw_only=True)
class FbankConfig:
    """Has the keys of the released audio/preprocessor_config.json, its sections joined.

    Defaults: what the project's sources say of the released file (rate, 25/10 ms, 80 bins, 0.97,
    stride 8, 1200 values a token); frequency limits, deltas and neighbors are not published, so
    these are Kaldi's usual ones for models made here. Raises ValueError for a value that cannot
    work.
    """

    freq: int = option("fbank", 16000)  # samples a second
    frame_length: float = option("fbank", 25)  # ms
    frame_shift: float = option("fbank", 10)  # ms
    preemphasis: float = option("fbank", 0.97)
    low_freq: float = option("fbank", 20)  # Hz
    high_freq: float = option("fbank", -400)  # Hz; below 0: counted from half the rate
    num_mel_bins: int = option("fbank", 80)
    padded_num_mel_bins: int | None = option("fbank", None)  # zeros behind the bins
    dither: float = option("fbank", 0.0)  # noise added to 16-bit samples
    delta_order: int = option("delta", 0)
    window_size: int = option("delta", 2)  # frames on each side
    left: int = option("splice", 7)  # neighbors that join a frame
    right: int = option("splice", 7)
    stride: int = option("splice", 8)
    random_start: bool = option("splice", False)
    seed: int = option("splice", 0)

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            check_type(entry, getattr(self, entry.name))
        low, high = self.mel_limits
        checks = {
            "freq": (self.freq in (8000, 16000), "must be 16000 or 8000"),
            "frame_length": (self.num_window_samples >= 2, "must cover two samples or more"),
            "frame_shift": (self.num_shift_samples >= 1, "must cover a sample or more"),
            "preemphasis": (0 <= self.preemphasis <= 1, "must be from 0 to 1"),
            "num_mel_bins": (self.num_mel_bins >= 4, "must be 4 or more"),
            "dither": (self.dither >= 0, "must be 0 or more"),
            "padded_num_mel_bins": (self.num_bins >= self.num_mel_bins, "is under num_mel_bins"),
            "low_freq": (low >= 0, "must be 0 or more"),
            # The official code takes 0 as 0 Hz, which gives filters of nothing.
            "high_freq": (
                low < high <= self.freq / 2,
                f"means {high:g} Hz: must be over low_freq and at most {self.freq // 2}",
            ),
            "delta_order": (self.delta_order >= 0, "must be 0 or more"),
            "window_size": (self.window_size >= 1 or not self.delta_order, "must be 1 or more"),
            "left": (self.left >= 0, "must be 0 or more"),
            "right": (self.right >= 0, "must be 0 or more"),
            "stride": (self.stride >= 1, "must be 1 or more"),
        }
        for name, (is_good, message) in checks.items():
            if not is_good:
                raise ValueError(f"{CONFIG_NAME}: {name}={getattr(self, name)!r} {message}")
        if self.random_start:
            logger.warning(
                "%s: random_start=true is not followed: it shifts the frames at each reading, "
                "but features are made once; every clip begins at its first frame",
                CONFIG_NAME,
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FbankConfig:
        """Read the sections `fbank`, `delta` and `splice`; ignore other keys, as officially.

        Raises ValueError naming every missing key.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{CONFIG_NAME}: must hold an object with `fbank`, `delta`, `splice`")
        found, missing = {}, []
        for entry in dataclasses.fields(cls):
            section = values.get(entry.metadata["section"], {})
            if not isinstance(section, dict):
                raise ValueError(f"{CONFIG_NAME}: {entry.metadata['section']} must hold keys")
            if entry.name in section:
                found[entry.name] = section[entry.name]
            elif entry.name not in ("padded_num_mel_bins", "random_start", "seed"):
                missing.append(f"{entry.metadata['section']}.{entry.name}")
        if missing:
            raise ValueError(f"{CONFIG_NAME}: missing: {', '.join(missing)}; add them")
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Return the official sections, as they are written to preprocessor_config.json."""
        sections: dict[str, Any] = {"cmvn": {"global_cmvn": CMVN_NAME}}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                sections.setdefault(entry.metadata["section"], {})[entry.name] = value
        return sections

    @property
    def num_window_samples(self) -> int:
        return int(self.freq * self.frame_length * 0.001)  # rounded as torchaudio does

    @property
    def num_shift_samples(self) -> int:
        return int(self.freq * self.frame_shift * 0.001)

    @property
    def mel_limits(self) -> tuple[float, float]:
        """Return the lowest and highest frequency in Hz."""
        high = self.high_freq + self.freq / 2 if self.high_freq < 0 else self.high_freq
        return self.low_freq, high

    @property
    def num_bins(self) -> int:
        """Return M, with what pads the bins."""
        padded = self.padded_num_mel_bins
        return self.num_mel_bins if padded is None else padded

    @property
    def frame_dim(self) -> int:
        """Return D."""
        return self.num_bins * (self.delta_order + 1)

    @property
    def feature_dim(self) -> int:
        """Return the values a token has: the encoder's input_size."""
        return self.frame_dim * (self.left + self.right + 1)


DEFAULT_CONFIG = FbankConfig()


@dataclass(frozen=True, eq=False)
class Fbank:
    """Computes by `fbank(waveform)` the features of a clip, not normalized without `cmvn`.

    Raises ValueError where the statistics are those of other frames.
    """

    config: FbankConfig = DEFAULT_CONFIG
    cmvn: Cmvn | None = None

    def __post_init__(self) -> None:
        if self.cmvn is not None and len(self.cmvn.mean) != self.config.frame_dim:
            raise ValueError(
                f"{CMVN_NAME} has {len(self.cmvn.mean)} values a frame, {CONFIG_NAME} makes "
                f"{self.config.frame_dim}: take both from the same model"
            )

    @classmethod
    def load(cls, folder: Path) -> Fbank:
        """Load a model's audio/ folder. Raises FileNotFoundError, or ValueError naming the file."""
        path = folder / CONFIG_NAME
        try:
            config = FbankConfig.from_dict(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{folder}: {CONFIG_NAME} cannot be used ({error})") from error
        cmvn_path = folder / CMVN_NAME
        return cls(config, Cmvn.from_stats(read_kaldi_matrix(cmvn_path), source=str(cmvn_path)))

    def __call__(self, waveform: Tensor) -> Tensor:
        """Turn (num_samples,) floats in [-1, 1] into features (N, feature_dim) float32.

        Raises ValueError as `compute_frames`.
        """
        frames = compute_frames(waveform, self.config)
        if self.cmvn is not None:
            mean, scale = (v.to(frames.device) for v in (self.cmvn.mean, self.cmvn.scale))
            frames = (frames - mean) * scale
        return splice(frames, self.config)


def save_fbank(folder: Path, config: FbankConfig, stats: Tensor) -> None:
    """Write what `Fbank.load` and the official code read; `stats` is (2, D+1)."""
    Fbank(config, Cmvn.from_stats(stats))  # raises for what could not be read back
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    write_kaldi_matrix(folder / CMVN_NAME, stats)


def num_audio_tokens(num_samples: int, config: FbankConfig = DEFAULT_CONFIG) -> int:
    """Return N of a clip; 0 where it is too short for a frame, an error of `compute_frames`.

    This is AudioFrameLengthCalculator of the official data/audio_data.py. Official features divide
    towards zero instead, so there a clip of 241 to 399 samples beside a longer one has a token
    that the prompt has no place for; not followed.
    """
    num_frames = (num_samples - config.num_window_samples) // config.num_shift_samples + 1
    return max(0, -(-num_frames // config.stride))


def compute_cmvn_stats(waveforms: Iterable[Tensor], config: FbankConfig = DEFAULT_CONFIG) -> Tensor:
    """Compute (2, D+1) float64 over all frames of the clips, in the form of `Cmvn.from_stats`.

    Statistics of parts of a data set add up. Raises ValueError as `compute_frames`.
    """
    stats = torch.zeros(2, config.frame_dim + 1, dtype=torch.float64)
    for waveform in waveforms:
        frames = compute_frames(waveform, config).double().cpu()
        stats[0, :-1] += frames.sum(0)
        stats[0, -1] += len(frames)
        stats[1, :-1] += frames.square().sum(0)
    return stats


def compute_frames(waveform: Tensor, config: FbankConfig = DEFAULT_CONFIG) -> Tensor:
    """Compute (F, D) log mel energies with deltas from (num_samples,), before normalization.

    Raises ValueError for what is no mono waveform, for NaN, and for under one frame (400 samples).
    """
    if waveform.ndim != 1 or not waveform.is_floating_point():
        raise ValueError(
            f"a {tuple(waveform.shape)} {waveform.dtype} tensor is no waveform: give "
            "(num_samples,) floats in [-1, 1] of one channel"
        )
    if len(waveform) < config.num_window_samples:
        raise ValueError(
            f"the sound has {len(waveform)} samples, under the {config.num_window_samples} "
            f"({config.frame_length:g} ms) of one frame: leave it out or append silence"
        )
    if not waveform.isfinite().all():
        raise ValueError("the sound holds NaN or infinite samples: decode it again or leave it out")
    # A surrounding bf16 autocast would ruin the energies.
    with torch.no_grad(), torch.autocast(waveform.device.type, enabled=False):
        return add_deltas(compute_log_mel(waveform.float(), config), config)


def compute_log_mel(waveform: Tensor, config: FbankConfig) -> Tensor:
    """Compute (F, M) logarithms of the power in each mel filter from (num_samples,), as Kaldi."""
    low, high = config.mel_limits
    # Dither is officially unseeded; the features of a clip are to be always the same.
    with torch.random.fork_rng(enabled=config.dither > 0):
        if config.dither:
            torch.manual_seed(config.seed)
        log_mel = kaldi.fbank(
            SAMPLE_SCALE * waveform[None],
            sample_frequency=config.freq,
            frame_length=config.frame_length,
            frame_shift=config.frame_shift,
            preemphasis_coefficient=config.preemphasis,
            low_freq=low,
            high_freq=high,
            num_mel_bins=config.num_mel_bins,
            dither=config.dither,
            remove_dc_offset=False,
        )
    return F.pad(log_mel, (0, config.num_bins - config.num_mel_bins))


def add_deltas(frames: Tensor, config: FbankConfig) -> Tensor:
    """Add to (F, M) slopes over `window_size` frames on each side, and slopes of these: (F, D).

    The first and last frame are repeated beyond the ends, and slopes of slopes are taken over
    that: one longer kernel, as in Kaldi.
    """
    n = config.window_size
    slope = np.arange(-n, n + 1) / (n * (n + 1) * (2 * n + 1) / 3)
    kernel, parts = np.ones(1), [frames]
    for order in range(1, config.delta_order + 1):
        kernel = np.convolve(kernel, slope)
        weight = torch.from_numpy(kernel).to(frames)
        windows = neighbors(frames, order * n, order * n)  # (F, len(kernel), M)
        parts.append(torch.einsum("fkm,k->fm", windows, weight))
    return torch.cat(parts, dim=1)


def splice(frames: Tensor, config: FbankConfig) -> Tensor:
    """Join every `stride`-th frame of (F, D) with its neighbors, oldest first: (N, feature_dim)."""
    return neighbors(frames, config.left, config.right, stride=config.stride).flatten(1)


def neighbors(frames: Tensor, left: int, right: int, *, stride: int = 1) -> Tensor:
    """Gather (F, W) to (ceil(F / stride), left + 1 + right, W); the end frames are repeated."""
    starts = torch.arange(0, len(frames), stride, device=frames.device)
    offsets = torch.arange(-left, right + 1, device=frames.device)
    return frames[(starts[:, None] + offsets).clamp(0, len(frames) - 1)]
