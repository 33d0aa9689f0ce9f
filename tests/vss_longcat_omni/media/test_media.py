"""Speech of any rate, the sound of an mp4, and frames by number: against painted videos."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
import soundfile
import torch

from tests.vss_longcat_omni.support.media_samples import (
    HEIGHT,
    WIDTH,
    make_video,
    paint,
    read_number,
    shift_video,
    turn_video,
)
from vss_longcat_omni.media import video
from vss_longcat_omni.media.audio import audio_duration, load_audio, save_audio
from vss_longcat_omni.media.video import (
    VideoInfo,
    load_audio_track,
    probe_video,
    read_frames,
    validate_video,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
FASTSTART = {"movflags": "faststart"}
UNEVEN = np.cumsum(np.resize([0.03, 0.5, 0.1, 0.033], 40)).tolist()


def tone(seconds: float, rate: int, *, hertz: float = 440.0) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * rate)) / rate)


def numbers(path: Path, indices: Sequence[int]) -> list[int]:
    return [read_number(picture) for picture in read_frames(path, indices)]


def find_packet(path: Path, number: int) -> tuple[int, int]:
    """(start, size) in the file of this frame, in the order stored."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        assert packet.pos is not None
        return packet.pos, packet.size


# Audio files.


@pytest.mark.parametrize("suffix", [".wav", ".mp3", ".flac"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 96000])
def test_audio_of_any_rate_is_read_as_16_khz(tmp_path: Path, suffix: str, rate: int) -> None:
    if (suffix, rate) == (".mp3", 96000):
        with pytest.raises(ValueError, match=r"t\.mp3: cannot be written at 96000 Hz"):
            save_audio(tmp_path / "t.mp3", tone(1, rate), sample_rate=rate)
        return
    path = tmp_path / f"tone{suffix}"
    save_audio(path, tone(1, rate), sample_rate=rate)
    waveform = load_audio(path)
    assert (waveform.dtype, waveform.ndim) == (torch.float32, 1)
    assert abs(len(waveform) - 16000) <= 16000 * 0.15 * (suffix == ".mp3")  # mp3 adds whole frames
    assert abs(audio_duration(path) - 1.0) < 0.15
    middle = waveform[4000:12000]
    assert torch.fft.rfft(middle).abs().argmax() == 220  # 440 Hz in bins of 2 Hz
    assert middle.abs().max() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "rate",
    [48000, pytest.param(47999, marks=pytest.mark.long)],  # librosa takes 10 s to import
)
def test_stereo_is_averaged_at_any_rate(tmp_path: Path, rate: int) -> None:
    left = tone(0.2, rate)
    soundfile.write(tmp_path / "s.wav", torch.stack([left, -left], dim=1).numpy(), rate)
    waveform = load_audio(tmp_path / "s.wav")
    assert waveform.abs().max() < 1e-4
    assert abs(len(waveform) - 3200) <= 1


def test_unusable_audio_names_the_file(tmp_path: Path) -> None:
    save_audio(tmp_path / "none.wav", torch.zeros(0), sample_rate=16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not audio")
    for name, message in (
        ("none.wav", "zero-length"),
        ("nan.wav", "NaN or infinite"),
        ("empty.wav", "zero-length"),
        ("text.wav", "not readable as wav, mp3 or flac"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            load_audio(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"gone\.wav: no such"):
        load_audio(tmp_path / "gone.wav")
    with pytest.raises(ValueError, match=r"use \.wav, \.mp3, \.flac"):
        save_audio(tmp_path / "a.ogg", torch.zeros(5), sample_rate=16000)


# The sound of an mp4.


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2)])
def test_the_sound_of_a_video_is_read_as_16_khz_mono(
    tmp_path: Path, rate: int, channels: int
) -> None:
    sound = tone(2.0, rate).expand(channels, -1).clone()
    sound[1:] *= 0.2
    path = make_video(tmp_path / "v.mp4", sound=sound.numpy(), sound_rate=rate)
    waveform = load_audio_track(path)
    assert (waveform.dtype, waveform.ndim) == (torch.float32, 1)
    assert abs(len(waveform) - 32000) < 2000
    middle = waveform[8000:24000]
    assert torch.fft.rfft(middle).abs().argmax() == 440  # in bins of 1 Hz
    assert middle.abs().max() == pytest.approx(0.5 if channels == 1 else 0.3, abs=0.03)
    assert probe_video(path).has_audio


def test_a_video_without_sound_or_pictures_says_so(tmp_path: Path) -> None:
    path = make_video(tmp_path / "mute.mp4")
    with pytest.raises(ValueError, match=r"mute\.mp4: no audio track"):
        load_audio_track(path)
    sound = tmp_path / "sound.mp4"
    save_audio(tmp_path / "sound.wav", tone(1, 16000), sample_rate=16000)
    (tmp_path / "sound.wav").rename(sound)
    assert len(load_audio_track(sound)) == 16000
    for read in (probe_video, validate_video, lambda path: read_frames(path, [0])):
        with pytest.raises(ValueError, match=r"sound\.mp4: no video track"):
            read(sound)


# Frames by number.


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"muxer": FASTSTART, "gop": 3},
        {"muxer": FRAGMENTS},
        {"muxer": FRAGMENTS, "gop": 3, "times": UNEVEN},
        {"times": UNEVEN, "gop": 30},
        {"options": {"x264-params": "open-gop=1"}},
        {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=9:open-gop=1"}},
        {"codec": "mpeg4", "options": {"bf": "2"}},
        # Here a jump to the time at which the keyframe is shown would go too far.
        {"codec": "mpeg4", "options": {"bf": "1"}, "muxer": FRAGMENTS, "gop": 2},
    ],
)
def test_frames_are_the_ones_asked_for(tmp_path: Path, kind: dict) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=40, **kind)
    info = validate_video(path)
    assert info == probe_video(path)
    assert (info.num_frames, info.width, info.height) == (40, WIDTH, HEIGHT)
    if "times" not in kind:
        assert (info.fps, info.duration) == (10, 4)
    with av.open(str(path)) as container:
        everything = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert [read_number(picture) for picture in everything] == list(range(40))
    assert np.array_equal(read_frames(path, range(40)), everything)
    rng = random.Random(0)
    for count in (1, 1, 1, 2, 3, 6, 12):
        indices = rng.choices(range(40), k=count)  # in any order, some twice
        assert np.array_equal(read_frames(path, indices), everything[indices]), indices


def test_only_what_is_needed_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "v.mp4", num_frames=200, gop=20)
    decoded: list[int] = []
    decode_from = video._decode_from

    def count(*args: object) -> object:
        for frame in decode_from(*args):  # pyright: ignore[reportArgumentType]
            decoded.append(read_number(frame.to_ndarray(format="rgb24")))
            yield frame

    monkeypatch.setattr(video, "_decode_from", count)
    assert numbers(path, [3, 45, 47, 199]) == [3, 45, 47, 199]
    assert decoded == [0, 1, 2, 3, *range(40, 48), *range(180, 200)]
    decoded.clear()
    assert numbers(path, range(15, 30)) == list(range(15, 30))
    assert decoded == list(range(30))  # the keyframe 20 is near: no jump


def test_times_and_rate_of_an_uneven_video(tmp_path: Path) -> None:
    info = probe_video(make_video(tmp_path / "v.mp4", num_frames=40, times=UNEVEN))
    assert info.duration == pytest.approx(UNEVEN[-1] - UNEVEN[0], abs=0.6)  # and the last frame
    assert info.fps == pytest.approx(40 / info.duration)


def test_what_the_edit_list_cuts_off_has_no_number(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", num_frames=40)
    path = shift_video(whole, tmp_path / "cut.mp4", num_frames=13)
    info = validate_video(path)
    assert (info.num_frames, info.fps) == (27, 10)
    assert numbers(path, [26, 0, 9]) == [39, 13, 22]


@pytest.mark.parametrize(
    ("turns", "matrix"),
    [(1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)), (3, (0, -1, 1, 0))],  # clockwise
)
def test_a_rotated_video_is_shown_upright(
    tmp_path: Path, turns: int, matrix: tuple[int, int, int, int]
) -> None:
    path = make_video(tmp_path / "v.mp4")
    turn_video(path, matrix)
    pictures = read_frames(path, [5])
    shown = np.rot90(paint(5), k=-turns)
    assert pictures.shape == (1, *shown.shape)
    assert np.abs(pictures[0].astype(int) - shown).mean() < 6
    info = probe_video(path)
    assert (info.height, info.width) == shown.shape[:2]


def test_colors_are_those_of_the_picture(tmp_path: Path) -> None:
    (picture,) = read_frames(make_video(tmp_path / "v.mp4"), [7])
    assert np.abs(picture.astype(int) - paint(7)).mean() < 5


# Files that cannot be used.


def test_a_cut_off_video_says_so(tmp_path: Path) -> None:
    sound = tone(4, 16000)[None].numpy()
    for muxer in (FASTSTART, FRAGMENTS, {}):
        data = make_video(tmp_path / "v.mp4", num_frames=40, muxer=muxer, sound=sound).read_bytes()
        for part in (0.3, 0.7, 0.97):
            path = tmp_path / "cut.mp4"
            path.write_bytes(data[: int(part * len(data))])
            for read in (probe_video, validate_video, lambda path: read_frames(path, [0])):
                with pytest.raises(ValueError, match=r"cut\.mp4: cut off"):
                    read(path)


def test_a_video_cut_off_between_two_frames_says_so(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "v.mp4", num_frames=40, muxer=FASTSTART)
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[: find_packet(whole, 30)[0]])
    with pytest.raises(ValueError, match=r"cut\.mp4: cut off: the file ends too early"):
        read_frames(path, [0])


def test_damage_is_found_also_in_the_frames_that_follow(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "v.mp4", num_frames=40, gop=40)
    start, size = find_packet(whole, 20)
    data = bytearray(whole.read_bytes())
    data[start + size // 2] ^= 0x55
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 40
    assert sum(frame.is_corrupt for frame in frames) == 1  # FFmpeg conceals it, and marks one
    assert read_number(frames[39].to_ndarray(format="rgb24")) != 39  # though all later ones differ
    assert probe_video(path).num_frames == 40  # which looks at the first frame alone
    assert numbers(path, [0, 3]) == [0, 3]
    for read in (validate_video, lambda path: read_frames(path, [39])):
        with pytest.raises(ValueError, match=r"damaged\.mp4: damaged before or at frame"):
            read(path)


def test_unusable_videos_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"empty\.mp4: the file is empty"):
        probe_video(tmp_path / "empty.mp4")
    with pytest.raises(ValueError, match=r"text\.mp4: cut off, damaged or no mp4 \(Invalid data"):
        read_frames(tmp_path / "text.mp4", [0])
    for read in (probe_video, load_audio_track):
        with pytest.raises(FileNotFoundError, match=r"gone\.mp4: no such video file"):
            read(tmp_path / "gone.mp4")
    path = make_video(tmp_path / "v.mp4")
    for indices, message in (
        ([3, 20], "no frame 20; it has frames 0 to 19"),
        ([-1], "no frame -1; it has"),
        ([], "no frame asked for; it has"),
    ):
        with pytest.raises(ValueError, match=rf"v\.mp4: {message}"):
            read_frames(path, indices)


def test_a_title_in_another_encoding_does_not_matter(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4")
    data = path.read_bytes()
    assert b"Lavf" in data  # the name of the muxer, a text that PyAV decodes on opening
    path.write_bytes(data.replace(b"Lavf", b"\xff\xe9vf"))
    assert probe_video(path) == VideoInfo(20, 10.0, WIDTH, HEIGHT, 2.0, has_audio=False)
