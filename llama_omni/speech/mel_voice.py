"""Speaks log-mel units by mean durations, mean spectra and Griffin-Lim: the embedded voice.

`vocoder.py` gives it where there is no HiFi-GAN: it needs the k-means file alone. It sounds like
a robot and is understood. Griffin-Lim runs frame by frame with a short look-ahead (RTISI-LA: Zhu,
Beauregard and Wyse, "Real-time signal estimation from modified short-time Fourier transform
magnitude spectra", 2007), so that speech streams: no sample depends on how the units were cut.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llama_omni.speech import log_mel
from llama_omni.speech.log_mel import HOP, N_FFT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from llama_omni.speech.kmeans import KMeans

LOOK_AHEAD = 2  # frames, 40 ms; more is not audible
ITERATIONS = 8  # per frame; each frame is refined LOOK_AHEAD + 1 times that
MIN_WINDOW_SUM = 1e-2  # under the first and last window's ends, where samples are hardly audible


class MelVoice:
    """Has `voice(units)` and `voice.stream(chunks)`; a second of speech takes a CPU 0.03 s.

    Exactly the same samples come out however the units are cut into chunks.
    """

    sample_rate = log_mel.SAMPLE_RATE

    def __init__(self, kmeans: KMeans) -> None:
        if kmeans.durations is None:
            raise ValueError("these log-mel centroids have no durations: fit them again")
        self.num_units = kmeans.num_units
        self.durations = kmeans.durations.tolist()
        self.magnitudes = log_mel.invert_log_mel(kmeans.centroids.cpu()).numpy()  # (K, 513)

    def __call__(self, units: Sequence[int]) -> Tensor:
        """Decodes deduplicated unit ids to (num_samples,) float32 on the CPU, 320 samples a frame.

        Raises:
            ValueError: an id outside the k-means.
        """
        return torch.cat([torch.empty(0), *self.stream([units])])

    def stream(self, chunks: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Yields a piece of waveform for each chunk of units (often shorter or empty, as it waits
        for the look-ahead), then the rest; together they are `voice(all units)`."""
        griffin_lim = RealTimeGriffinLim()
        time, num_frames = 0.0, 0
        for units in chunks:
            pieces = []
            for unit in units:
                if not 0 <= unit < self.num_units:
                    raise ValueError(f"unit {unit} is outside the voice's 0..{self.num_units - 1}")
                # Rounding the running time, not each duration, keeps the tempo.
                time += self.durations[unit]
                end = math.floor(time + 0.5)
                for _ in range(end - num_frames):
                    pieces.append(griffin_lim.push(self.magnitudes[unit]))
                num_frames = end
            yield torch.from_numpy(np.concatenate([np.empty(0, np.float32), *pieces]))
        yield torch.from_numpy(griffin_lim.finish())


class RealTimeGriffinLim:
    """Turns magnitude frames, one by one, into HOP samples each, LOOK_AHEAD frames later.

    The frame being settled and those of the look-ahead are refined together against what settled
    frames have left in their place; then it is settled, and never changes again.
    """

    def __init__(self) -> None:
        self.window = torch.hann_window(N_FFT).numpy()
        # Phases where there is no signal yet to take them from; noise, since zeros would click.
        angles = np.random.default_rng(0).uniform(-np.pi, np.pi, N_FFT // 2 + 1)
        self.first_phases = np.exp(1j * angles).astype(np.complex64)
        # From the start of the oldest frame that is not settled:
        self.settled = np.zeros(N_FFT, np.float32)  # sum of settled frames (windowed twice)
        self.settled_weight = np.zeros(N_FFT, np.float32)  # sum of their squared windows
        self.magnitudes: list[np.ndarray] = []  # (513,) of the frames not settled
        self.frames: list[np.ndarray] = []  # (1024,) their estimates, windowed twice
        self.num_skipped = 0  # the first window is centered on sample 0
        self.num_pushed = self.num_samples = 0

    def push(self, magnitudes: np.ndarray) -> np.ndarray:
        """Takes magnitudes (513,); returns up to HOP samples."""
        self.num_pushed += 1
        self.magnitudes.append(magnitudes)
        self.frames.append(np.zeros(N_FFT, np.float32))
        return self._settle() if len(self.frames) > LOOK_AHEAD else np.empty(0, np.float32)

    def finish(self) -> np.ndarray:
        """Returns what is left after the last frame: the total is then HOP samples for each."""
        pieces = [np.empty(0, np.float32)]
        while self.frames:
            pieces.append(self._settle())
        pieces.append(self._take(N_FFT - HOP) if self.num_pushed else pieces[0])
        rest = self.num_pushed * HOP - self.num_samples + sum(map(len, pieces))
        return np.concatenate(pieces)[:rest]

    def _settle(self) -> np.ndarray:
        self._refine()
        self.settled += self.frames.pop(0)
        self.settled_weight += self.window**2
        self.magnitudes.pop(0)
        return self._take(HOP)

    def _take(self, num_samples: int) -> np.ndarray:
        """Returns the first samples, which no later frame reaches, and shifts the buffers."""
        weight = np.maximum(self.settled_weight[:num_samples], MIN_WINDOW_SUM)
        samples = self.settled[:num_samples] / weight
        for buffer in (self.settled, self.settled_weight):
            buffer[:-num_samples] = buffer[num_samples:].copy()
            buffer[-num_samples:] = 0
        skipped = min(N_FFT // 2 - self.num_skipped, len(samples))
        self.num_skipped += skipped
        self.num_samples += len(samples) - skipped
        return samples[skipped:]

    def _refine(self) -> None:
        """Runs Griffin-Lim over frames not settled: overlap, keep the phases, set magnitudes."""
        count = len(self.frames)
        starts = [number * HOP for number in range(count)]
        length = N_FFT + starts[-1]
        settled, weight = np.zeros(length, np.float32), np.zeros(length, np.float32)
        settled[:N_FFT], weight[:N_FFT] = self.settled, self.settled_weight
        for start in starts:
            weight[start : start + N_FFT] += self.window**2
        weight = np.maximum(weight, MIN_WINDOW_SUM)
        magnitudes, frames = np.stack(self.magnitudes), np.stack(self.frames)
        for _ in range(ITERATIONS):
            signal = settled.copy()
            for start, frame in zip(starts, frames, strict=True):
                signal[start : start + N_FFT] += frame
            signal /= weight
            cut = np.stack([signal[start : start + N_FFT] for start in starts])
            spectrum = np.fft.rfft(cut * self.window)
            size = np.abs(spectrum)
            phases = np.where(size > 1e-7, spectrum / np.maximum(size, 1e-7), self.first_phases)
            frames = np.fft.irfft(magnitudes * phases, N_FFT).astype(np.float32) * self.window
        self.frames = list(frames)
