"""Prepared files: made once, made again when anything changes, whole or not there."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.vss_longcat_omni.support.media_samples import make_video
from vss_longcat_omni.dataset import prepare as preparing
from vss_longcat_omni.dataset.folders import find_samples
from vss_longcat_omni.dataset.prepare import PreparedSample, Settings, prepare
from vss_longcat_omni.media.audio import load_audio, save_audio
from vss_longcat_omni.media.pixels import PixelConfig
from vss_longcat_omni.media.video import load_audio_track
from vss_longcat_omni.model.loading import load_config
from vss_longcat_omni.speech.codec import open_codec
from vss_longcat_omni.speech.fit_codec import fit_codec

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vss_longcat_omni.conftest import Ground
    from vss_longcat_omni.speech.codec import SpeechCodec


@pytest.fixture(scope="module")
def codec(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> SpeechCodec:
    folder = tmp_path_factory.mktemp("codec") / "fitted"
    fit_codec([sample.output_audio for sample in find_samples(ground.data)], folder)
    return open_codec(str(folder))


@pytest.fixture
def data(ground: Ground, tmp_path: Path) -> Path:
    for name in ("01", "02", "03"):
        shutil.copytree(ground.data / "training" / name, tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.fixture
def settings(ground: Ground) -> Settings:
    vision = load_config(ground.model).vision_config or {}
    return Settings(
        pixels=PixelConfig.from_dict(vision, source="vision/config.json"),
        model_folder=ground.model,
        frame_sampling="multimodal_interleaved",
    )


def run(data: Path, settings: Settings, codec: SpeechCodec) -> list[PreparedSample]:
    cache = data.parent / "cache"
    return prepare(find_samples(data), settings, codec, cache, num_workers=2)


def times(data: Path) -> dict[str, int]:
    """Of all prepared files."""
    return {p.name: p.stat().st_mtime_ns for p in (data.parent / "cache").glob("*.safetensors")}


def test_what_is_prepared_is_what_the_files_hold(
    data: Path, settings: Settings, codec: SpeechCodec
) -> None:
    prepared = run(data, settings, codec)
    assert [p.sample.name for p in prepared] == ["01", "02", "03"]
    first = prepared[0]
    media = preparing.load_inputs(first.sample.video, first.sample.input_audio, settings)
    assert torch.equal(first.load_frames(), media.frames)
    assert torch.equal(first.load_features(), media.features)
    assert first.timestamps == media.timestamps == ("second{0.0}:", "second{1.3}:")
    assert first.frame_shape == tuple(media.frames.shape)
    assert first.num_audio_tokens == len(media.features)
    speech = load_audio(first.sample.output_audio)
    assert torch.equal(first.codes, codec.encode(speech))
    assert len(first.codes) == -(-len(speech) // 960)


def test_nothing_is_made_twice(data: Path, settings: Settings, codec: SpeechCodec) -> None:
    run(data, settings, codec)
    before = times(data)
    assert len(before) == 6
    run(data, settings, codec)
    assert times(data) == before


def test_what_changed_is_made_again(data: Path, settings: Settings, codec: SpeechCodec) -> None:
    old = run(data, settings, codec)
    before = times(data)
    answer = data / "02" / "output.wav"
    save_audio(answer, load_audio(answer)[:16000], sample_rate=16000)
    new = run(data, settings, codec)
    assert len(new[1].codes) == 17 != len(old[1].codes)
    assert new[1].path == old[1].path  # the video and the question are what they were
    assert len(times(data).keys() - before.keys()) == 1


def test_a_recording_that_answers_two_samples_is_encoded_once(
    data: Path, settings: Settings, codec: SpeechCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(data / "01" / "output.wav", data / "03" / "output.wav")
    encode, encoded = codec.encode, []
    monkeypatch.setattr(codec, "encode", lambda x: encoded.append(len(x)) or encode(x))
    first, second, third = run(data, settings, codec)
    assert len(encoded) == 2
    assert torch.equal(first.codes, third.codes)
    assert not torch.equal(first.codes, second.codes)
    for name in ("01", "03"):
        (data / name / "output.wav").write_bytes(b"no speech")
    assert [p.sample.name for p in run(data, settings, codec)] == ["02"]


def test_other_settings_make_other_files(
    data: Path, settings: Settings, codec: SpeechCodec
) -> None:
    plain = Settings(settings.pixels, settings.model_folder, "plain_2fps")
    found, wanted = run(data, plain, codec)[0], run(data, settings, codec)[0]
    assert found.path != wanted.path
    assert found.timestamps != wanted.timestamps


def test_a_videos_sound_comes_before_the_question_where_that_is_asked(
    data: Path, settings: Settings, codec: SpeechCodec
) -> None:
    """Of three videos the first has a sound of its own, a second long."""
    sound = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    make_video(data / "01" / "input.mp4", sound=sound.numpy(), sound_rate=16000)
    quiet = run(data, settings, codec)
    loud = run(data, replace(settings, use_audio_track=True), codec)
    more = [b.num_audio_tokens - a.num_audio_tokens for a, b in zip(quiet, loud, strict=True)]
    assert more[0] in (12, 13, 14)  # 80 ms each, and the codec of the mp4 pads
    assert more[1:] == [0, 0]
    sample = loud[0].sample
    sound = torch.cat([load_audio_track(sample.video), load_audio(sample.input_audio)])
    fbank = preparing.load_fbank(settings.model_folder)
    assert torch.equal(loud[0].load_features(), fbank(sound))


def test_a_file_that_was_cut_off_is_made_again(
    data: Path, settings: Settings, codec: SpeechCodec
) -> None:
    (first, *_) = run(data, settings, codec)
    frames, whole = first.load_frames().clone(), first.path.read_bytes()  # not the mapped file
    first.path.write_bytes(whole[: len(whole) // 2])
    (again, *_) = run(data, settings, codec)
    assert again.path == first.path
    assert torch.equal(again.load_frames(), frames)


def test_samples_that_cannot_be_read_are_left_out_and_reported(
    data: Path, settings: Settings, codec: SpeechCodec, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "02" / "input.mp4").write_bytes(b"no video")
    (data / "03" / "output.wav").write_bytes(b"no speech")
    with caplog.at_level(logging.WARNING):
        prepared = run(data, settings, codec)
    assert [p.sample.name for p in prepared] == ["01"]
    warned = [r.message for r in caplog.records if r.message.startswith("left out: ")]
    assert len(warned) == 2
    assert str(data / "02" / "input.mp4") in warned[0]
    assert str(data / "03" / "output.wav") in warned[1]
    (data / "01" / "input.wav").write_bytes(b"no question")
    with pytest.raises(ValueError, match="no sample could be read; the first: "):
        run(data, settings, codec)
