"""Reads from mp4 videos chosen frames and the sound inside, or says what is wrong with them.

First step of the data flow: a sample's video -> frames and sound -> pixels.py and fbank.py;
audio.py reads speech files. PyAV, whose wheel holds FFmpeg, reads, so no system library is needed.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from vss_longcat_omni.media.audio import resample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Letters of another encoding in a title are no error; PyAV 19 takes them without being asked.
OPEN_OPTIONS: Any = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
SEEK_GAIN = 8  # frames: a jump that saves fewer decodes more, since B-frames come late


def load_audio_track(path: Path, *, sample_rate: int = 16000) -> torch.Tensor:
    """Read the sound inside an mp4, (num_samples,) float32 mono; several channels are averaged.

    Raises FileNotFoundError, or ValueError: unreadable, damaged, no audio track, or an empty one.
    """
    with _open(path) as container:
        if not container.streams.audio:
            raise ValueError(f"{path}: no audio track")
        stream = container.streams.audio[0]
        to_float = av.AudioResampler(format="fltp")
        frames = (frame for packet in _packets(container, stream) for frame in packet.decode())
        parts = [part.to_ndarray() for frame in frames for part in to_float.resample(frame)]
        file_rate = stream.rate
    if not parts:
        raise ValueError(f"{path}: zero-length audio")
    mono = np.concatenate(parts, axis=1).mean(axis=0)
    if not np.isfinite(mono).all():
        raise ValueError(f"{path}: the audio holds NaN or infinite samples")
    return resample(torch.from_numpy(mono), file_rate, sample_rate)


@dataclass(frozen=True)
class VideoInfo:
    """Describes an mp4's first video track; `width` and `height` as displayed, after rotation."""

    num_frames: int
    fps: float  # num_frames / duration: the average, where the rate varies
    width: int
    height: int
    duration: float  # seconds, from the start of the first frame to the end of the last
    has_audio: bool


def probe_video(path: Path) -> VideoInfo:
    """Return what the video holds, counted from its packets; only the first frame is decoded.

    Raises FileNotFoundError, or ValueError: not a video, no video track, cut off, or damaged.
    """
    with _open(path) as container:
        return _probe(container, _scan(container))


def validate_video(path: Path) -> VideoInfo:
    """Probe as `probe_video`, but decode every frame, so damage anywhere raises its ValueError."""
    with _open(path) as container:
        track = _scan(container)
        for _ in _decode(container, track, range(len(track.times))):
            pass
        return _probe(container, track)


def read_frames(path: Path, indices: Sequence[int]) -> np.ndarray:
    """Read the frames of these numbers, in the order given: (len(indices), H, W, 3) uint8 RGB.

    Numbers count frames as shown, from 0, whatever their order in the file or their spacing in
    time; one may come twice. Decoding starts at the keyframe before a frame that lies far from the
    last one. Pictures are rotated as the file says, and have its pixels: neither stretched where
    these are not square, nor tone-mapped where they are HDR.

    Raises FileNotFoundError, or ValueError: as `probe_video`, or a number that no frame has.
    """
    with _open(path) as container:
        track = _scan(container)
        num_frames = len(track.times)
        wrong = [index for index in indices if not 0 <= index < num_frames]
        if wrong or len(indices) == 0:
            asked = f"no frame {wrong[0]}" if wrong else "no frame asked for"
            raise ValueError(f"{path}: {asked}; it has frames 0 to {num_frames - 1}")
        wanted = np.asarray(indices)
        pictures = np.empty(0, np.uint8)
        # Its own, of one thread: that of PyAV has threads that a forked process
        # (dataset/prepare.py) would wait for in vain.
        reformatter = VideoReformatter()
        for number, frame in _decode(container, track, np.unique(wanted).tolist()):
            picture = _to_picture(frame, reformatter)
            if not pictures.size:  # one array: a list that is stacked would need twice the memory
                pictures = np.empty((len(wanted), *picture.shape), np.uint8)
            if picture.shape != pictures.shape[1:]:
                raise ValueError(
                    f"{path}: its pictures change size at frame {number}; re-encode it"
                )
            pictures[wanted == number] = picture
    return pictures


@dataclass(frozen=True)
class _Track:
    """Holds presentation times of a video track, in units of its `time_base`."""

    stream: VideoStream
    times: list[int]  # of all frames, in the order shown
    keyframes: list[tuple[int, int]]  # (when shown, when to be decoded), in the order shown
    end: int  # when the last frame ends


@contextlib.contextmanager
def _open(path: Path) -> Iterator[InputContainer]:
    """Open the file, and raise FFmpeg's errors, while it is open, as a ValueError that names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such video file")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        with av.open(str(path), **OPEN_OPTIONS) as container:
            yield container
    except FFmpegError as error:
        raise ValueError(
            f"{path}: cut off, damaged or no mp4 ({error.strerror}); get it again or re-encode it"
        ) from error


def _packets(container: InputContainer, stream: AudioStream | VideoStream) -> Iterator[Packet]:
    """Yield the stream's packets, with the empty one that ends the decoding.

    Half a packet, of whatever track, is an error: the file was cut off there.
    """
    for packet in container.demux():
        if packet.is_corrupt:
            raise ValueError(f"{container.name}: cut off: the file ends too early; get it again")
        if packet.stream_index == stream.index:
            yield packet


def _scan(container: InputContainer) -> _Track:
    """Read the file once, without decoding.

    The header's count and rate are not enough: B-frames are stored out of order, frames may lie
    unevenly, and what an edit list cuts off is counted too.
    """
    if not container.streams.video:
        raise ValueError(f"{container.name}: no video track")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # the loader's workers are the threads
    times, keyframes, num_packets, end = [], [], 0, 0
    for packet in _packets(container, stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.dts is None:
            raise ValueError(f"{container.name}: a frame has no time; re-encode it")
        num_packets += 1
        if packet.is_keyframe:
            keyframes.append((packet.pts, packet.dts))
        if not packet.is_discard:  # else it is decoded for others, but lies outside the edit list
            times.append(packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
    if num_packets < len(stream.index_entries):
        raise ValueError(f"{container.name}: cut off: the file ends too early; get it again")
    if not times or not keyframes:
        raise ValueError(f"{container.name}: its video track holds no frame; re-encode it")
    return _Track(stream, sorted(times), sorted(keyframes), end)


def _probe(container: InputContainer, track: _Track) -> VideoInfo:
    stream, num_frames = track.stream, len(track.times)
    ((_, frame),) = _decode(container, track, [0])
    seconds = (track.end - track.times[0]) * Fraction(stream.time_base or 0)
    if seconds <= 0:  # one frame that does not say how long it is shown
        seconds = num_frames / Fraction(stream.average_rate or 25)
    height, width = frame.height, frame.width
    if frame.rotation % 180:
        height, width = width, height
    return VideoInfo(
        num_frames=num_frames,
        fps=float(num_frames / seconds),
        width=width,
        height=height,
        duration=float(seconds),
        has_audio=bool(container.streams.audio),
    )


def _decode(
    container: InputContainer, track: _Track, numbers: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (number, frame) for rising frame numbers."""
    decoded: Iterator[VideoFrame] = iter(())
    start = 0
    last = -1 - SEEK_GAIN  # so that the first number is sought: the packets were read before
    for number in numbers:
        time = track.times[number]
        # A frame never needs one from before the last keyframe that is not shown after it.
        place = bisect_right(track.keyframes, time, key=lambda keyframe: keyframe[0])
        keyframe = track.keyframes[max(0, place - 1)]
        if bisect_right(track.times, keyframe[0]) - 1 - last >= SEEK_GAIN:
            decoded, start = _decode_from(container, track.stream, keyframe), keyframe[0]
        for frame in decoded:
            # Frames after a damaged one show its damage without a mark of their own; those shown
            # before the keyframe may need what comes before it in the file.
            if frame.is_corrupt and frame.pts is not None and frame.pts >= start:
                raise ValueError(f"{container.name}: damaged before or at frame {number}")
            if frame.pts == time:
                yield number, frame
                break
        else:
            raise ValueError(f"{container.name}: frame {number} cannot be decoded; re-encode it")
        last = number


def _decode_from(
    container: InputContainer, stream: VideoStream, keyframe: tuple[int, int]
) -> Iterator[VideoFrame]:
    """Yield frames from this keyframe on, or from an earlier one."""
    # FFmpeg compares with the times shown, in a file of fragments with those of decoding. The
    # second are the earlier ones, so with them the jump never goes too far.
    for time in keyframe:
        container.seek(time, stream=stream)
        packets = container.demux(stream)
        first = next(packets)
        if first.dts is not None and first.dts <= keyframe[1]:
            break
    else:
        raise ValueError(f"{container.name}: its index is wrong; re-encode it")
    return (frame for packet in chain([first], packets) for frame in packet.decode())


def _to_picture(frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB, upright; colors by the file's tags (BT.601 where it has none)."""
    picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    if frame.rotation:
        picture = np.rot90(picture, k=round(frame.rotation / 90))  # both counter-clockwise
    return picture
