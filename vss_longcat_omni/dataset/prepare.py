"""Prepares samples as files of frames and features, and of codes, once for every run.

It is the first thing that train_ds.py does (and, with --prepare_only, all). A file is named after
the content of the sample's files and all settings that it depends on: what has changed is made
again, a killed run continues where it stopped, and several processes or nodes may start at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from vss_longcat_omni.media.audio import load_audio
from vss_longcat_omni.media.fbank import Fbank
from vss_longcat_omni.media.frame_sampling import sample_frames
from vss_longcat_omni.media.pixels import PixelConfig, resize_frames
from vss_longcat_omni.media.video import load_audio_track, probe_video, read_frames

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from vss_longcat_omni.dataset.folders import Sample
    from vss_longcat_omni.media.frame_sampling import Strategy
    from vss_longcat_omni.options.run_arguments import SamplingRule
    from vss_longcat_omni.speech.codec import SpeechCodec

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files: raised when what they hold changes
MAX_REPORTED = 10  # bad samples in one message


@dataclass(frozen=True)
class Settings:
    """Holds all that prepared files depend on beside the sample itself."""

    pixels: PixelConfig
    model_folder: Path  # its audio/ says how sound becomes features
    frame_sampling: SamplingRule
    use_audio_track: bool = False  # the video's own sound before the question

    def fingerprint(self) -> str:
        fbank = load_fbank(self.model_folder)
        sound = [fbank.config.to_dict()]
        if fbank.cmvn is not None:
            sound += [fbank.cmvn.mean.tolist(), fbank.cmvn.scale.tolist()]
        facts = [FORMAT, asdict(self.pixels), sound, self.frame_sampling, self.use_audio_track]
        return _digest(json.dumps(facts))


@dataclass(frozen=True)
class MediaFeatures:
    """Holds what the model gets of one video and one question."""

    frames: Tensor  # (frames, height, width, 3) uint8, resized
    timestamps: tuple[str, ...]  # of each pair of frames
    strategy: Strategy  # how sound lies between them
    features: Tensor  # (audio tokens, feature size) float32


@dataclass(frozen=True)
class PreparedSample:
    """A sample with its file; small things are read at once, large ones when asked for."""

    sample: Sample
    path: Path
    timestamps: tuple[str, ...]
    strategy: Strategy
    frame_shape: tuple[int, ...]  # (frames, height, width, 3)
    num_audio_tokens: int
    codes: Tensor  # (N, 4) int64, the answer

    @property
    def has_cached_transcript(self) -> bool:
        """Say whether its transcript is not the user's own output.txt."""
        own = self.sample.transcript
        return own is not None and own.parent != self.sample.output_audio.parent

    def load_media(self) -> MediaFeatures:
        frames, features = self.load_frames(), self.load_features()
        return MediaFeatures(frames, self.timestamps, self.strategy, features)

    def load_frames(self) -> Tensor:
        """Read (frames, height, width, 3) uint8, resized."""
        return _read(self.path, "frames")

    def load_features(self) -> Tensor:
        """Read (num_audio_tokens, feature size) float32."""
        return _read(self.path, "features")


@lru_cache(maxsize=2)
def load_fbank(model_folder: Path) -> Fbank:
    return Fbank.load(model_folder / "audio")


def prepare(
    samples: Sequence[Sample],
    settings: Settings,
    codec: SpeechCodec,
    cache_dir: Path,
    *,
    num_workers: int,
) -> list[PreparedSample]:
    """Prepare what is not there yet; samples that cannot be read are left out with a warning.

    Samples without a transcript get the one that tools/transcribe.py wrote into the cache, if it
    did. Videos and questions are read by `num_workers` processes, answers are encoded by this one,
    whose codec may sit on a GPU.

    Raises:
        ValueError: no sample can be read.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    with locked(cache_dir / "prepare.lock"):
        digests = ContentDigests(cache_dir / "digests.json")
        of_settings, of_codec = settings.fingerprint(), f"{FORMAT} {codec.fingerprint}"
        paths = {}
        for sample in samples:
            media = of_settings + digests.of(sample.video) + digests.of(sample.input_audio)
            targets = of_codec + digests.of(sample.output_audio)
            paths[sample.name] = (
                cache_dir / f"{_digest(media)}.seen.safetensors",
                cache_dir / f"{_digest(targets)}.said.safetensors",
            )
        digests.save()
        samples = [with_transcript(sample, digests, cache_dir) for sample in samples]
        problems = _prepare_media(samples, paths, settings, num_workers)
        problems |= _prepare_targets(samples, paths, codec)
    for text in list(problems.values())[:MAX_REPORTED]:
        logger.warning("left out: %s", text)
    if len(problems) > MAX_REPORTED:
        logger.warning("%d more samples are left out", len(problems) - MAX_REPORTED)
    if len(problems) == len(samples):
        raise ValueError(f"no sample could be read; the first: {next(iter(problems.values()))}")
    return [open_prepared(s, *paths[s.name]) for s in samples if s.name not in problems]


def save_media(sample: Sample, settings: Settings, path: Path) -> None:
    """Save a sample's media features; raises as `load_inputs`."""
    media = load_inputs(sample.video, sample.input_audio, settings)
    metadata = {"timestamps": json.dumps(media.timestamps), "strategy": media.strategy}
    _save({"frames": media.frames, "features": media.features}, path, metadata)


def load_inputs(video: Path, audio: Path, settings: Settings) -> MediaFeatures:
    """Return what the model gets of a video and a question.

    Raises:
        ValueError, FileNotFoundError: a file that cannot be used, by its name.
    """
    info = probe_video(video)
    chosen = sample_frames(info.num_frames, info.fps, rule=settings.frame_sampling)
    frames = resize_frames(read_frames(video, chosen.frame_indices), settings.pixels)
    with naming(audio):
        sound = load_audio(audio)
        if settings.use_audio_track and info.has_audio:
            sound = torch.cat([load_audio_track(video), sound])
        features = load_fbank(settings.model_folder)(sound)
    return MediaFeatures(frames, chosen.timestamps, chosen.strategy, features)


def open_prepared(sample: Sample, media: Path, targets: Path) -> PreparedSample:
    with safe_open(media, "pt") as file:
        metadata = file.metadata()
        return PreparedSample(
            sample=sample,
            path=media,
            timestamps=tuple(json.loads(metadata["timestamps"])),
            strategy="average" if metadata["strategy"] == "average" else "sequential",
            frame_shape=tuple(file.get_slice("frames").get_shape()),
            num_audio_tokens=file.get_slice("features").get_shape()[0],
            codes=_read(targets, "codes").long(),
        )


def with_transcript(sample: Sample, digests: ContentDigests, cache_dir: Path) -> Sample:
    """Return the sample, with the cached transcript where it has none of its own."""
    if sample.transcript is not None:
        return sample
    path = transcript_path(digests.of(sample.output_audio), cache_dir)
    return replace(sample, transcript=path) if path.is_file() else sample


def transcript_path(digest: str, cache_dir: Path) -> Path:
    """Return where tools/transcribe.py writes what an answer of this content says."""
    return cache_dir / "transcripts" / f"{digest}.txt"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process in at a time; the others wait, and the lock of a killed one is free."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let ValueErrors from inside begin with the file's name."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


class ContentDigests:
    """Remembers digests of files' content by size and time, so that each is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, list[Any]] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):  # none yet, or cut off: they are computed again
            self.known = {}

    def of(self, path: Path) -> str:
        stat = path.stat()
        known = self.known.get(str(path))
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            known = self.known[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
        return known[2]

    def save(self) -> None:
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(self.known))
        temporary.replace(self.path)


def _prepare_media(
    samples: Sequence[Sample],
    paths: dict[str, tuple[Path, Path]],
    settings: Settings,
    num_workers: int,
) -> dict[str, str]:
    """Return by name what is wrong with the samples whose video or question cannot be used."""
    todo = [sample for sample in samples if not _is_whole(paths[sample.name][0])]
    if not todo:
        return {}
    problems = {}
    # By fork, as a DataLoader's workers: others would import train_ds.py, which takes longer than
    # reading a hundred samples. With one thread each they never touch the parent's thread pool.
    context = get_context("fork")
    with ProcessPoolExecutor(max(1, min(num_workers, len(todo))), context, _one_thread) as pool:
        futures = {pool.submit(save_media, s, settings, paths[s.name][0]): s for s in todo}
        for future in tqdm(as_completed(futures), total=len(todo), desc="videos and questions"):
            try:
                future.result()
            except (ValueError, OSError) as error:
                problems[futures[future].name] = str(error)
    return problems


def _prepare_targets(
    samples: Sequence[Sample], paths: dict[str, tuple[Path, Path]], codec: SpeechCodec
) -> dict[str, str]:
    """Encode answers, each recording once; return by name what is wrong with those that fail."""
    targets = {sample.name: paths[sample.name][1] for sample in samples}
    todo = {targets[s.name]: s.output_audio for s in samples if not _is_whole(targets[s.name])}
    problems = {}
    for path, recording in tqdm(todo.items(), desc="answers", disable=not todo):
        try:
            with naming(recording):
                codes = codec.encode(load_audio(recording))
            _save({"codes": codes.to(torch.int32)}, path, {})
        except (ValueError, OSError) as error:
            problems[path] = str(error)
    return {name: problems[path] for name, path in targets.items() if path in problems}


def _one_thread() -> None:
    torch.set_num_threads(1)


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return bool(file.keys())
    except (FileNotFoundError, SafetensorError):
        return False


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write atomically."""
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)
    temporary.replace(path)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
