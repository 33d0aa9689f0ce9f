"""Folders to samples in either layout, and messages for what is not there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from vss_longcat_omni.dataset.folders import (
    Sample,
    find_samples,
    find_split,
    list_sample_folders,
    read_transcript,
)

if TYPE_CHECKING:
    from pathlib import Path

NEW = ("input.mp4", "input.wav", "output.wav")
OLD = ("in.mp4", "in.wav", "out.wav")


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_both_layouts_are_found_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path / "new" / "training" / "10", *NEW)
    touch(tmp_path / "new" / "training" / "2", "input.mp4", "input.mp3", "output.mp3", "output.txt")
    touch(tmp_path / "new" / "training" / "clip-b 7", *NEW)
    touch(tmp_path / "new" / "training" / ".ipynb_checkpoints", *NEW)
    touch(tmp_path / "new" / "training", "readme.txt")
    touch(tmp_path / "new" / "test" / "01", *NEW)
    samples = find_samples(tmp_path / "new")
    assert [sample.name for sample in samples] == ["2", "10", "clip-b 7"]
    folder = tmp_path / "new" / "training" / "2"
    assert samples[0] == Sample(
        name="2",
        video=folder / "input.mp4",
        input_audio=folder / "input.mp3",
        output_audio=folder / "output.mp3",
        transcript=folder / "output.txt",
    )
    assert samples[1].transcript is None
    assert [sample.name for sample in find_samples(tmp_path / "new", split="test")] == ["01"]

    touch(tmp_path / "old" / "train" / "01", *OLD, "out.txt")
    (sample,) = find_samples(tmp_path / "old")
    paths = (sample.video, sample.input_audio, sample.output_audio, sample.transcript)
    assert [path and path.name for path in paths] == [*OLD, "out.txt"]
    assert sample.video.parent == tmp_path / "old" / "train" / "01"


def test_the_folder_around_the_samples_may_be_given(tmp_path: Path) -> None:
    touch(tmp_path / "data" / "training" / "01", *NEW)
    touch(tmp_path / "made" / "01", *NEW)
    assert len(find_samples(tmp_path / "data" / "training")) == 1
    assert len(find_samples(tmp_path / "made", split="test")) == 1
    # But training samples are no test samples.
    for folder in (tmp_path / "data" / "training", tmp_path / "data"):
        with pytest.raises(ValueError, match="No valid samples found for the split test"):
            find_samples(folder, split="test")


def test_wav_is_used_where_both_are_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = touch(tmp_path / "training" / "01", *NEW, "input.mp3", "output.mp3")
    caplog.set_level(logging.INFO)
    (sample,) = find_samples(tmp_path)
    assert (sample.input_audio.name, sample.output_audio.name) == ("input.wav", "output.wav")
    notice = "input.wav is used, input.mp3 is not; output.wav is used, output.mp3 is not"
    assert f"{folder}: {notice}" in caplog.text
    assert list_sample_folders(tmp_path / "training")[0].notice == notice


def test_incomplete_folders_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path / "training" / "01", *NEW)
    touch(tmp_path / "training" / "02", "input.mp4", "input.wav")
    touch(tmp_path / "train" / "01", *NEW)
    assert [sample.name for sample in find_samples(tmp_path)] == ["01"]
    assert "1 of 2 folders are not complete and left out" in caplog.text
    assert "02: no output.wav or output.mp3; it holds nothing else" in caplog.text
    assert f"{tmp_path / 'training'} is used, and {tmp_path / 'train'} is not" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Input.mp4", "audio.wav", "target.mp3"],
         "no input.mp4, no input.wav or input.mp3, no output.wav or output.mp3; it holds "
         "Input.mp4, audio.wav, target.mp3 instead, and names must be exact"),
        (["input.mov", "input.wav", "output.flac"],
         "no input.mp4, no output.wav or output.mp3; it holds input.mov, output.flac instead"),
        (["in.mp4", "in.wav"], "no out.wav or out.mp3; it holds nothing else"),
        (["in.mp4", "in.wav", "output.wav"], "no out.wav or out.mp3; it holds output.wav instead"),
        ([], "no output.wav or output.mp3; it is empty"),
    ],
)  # fmt: skip
def test_no_valid_samples_names_the_close_misses(
    tmp_path: Path, names: list[str], message: str
) -> None:
    folder = touch(tmp_path / "data" / "training" / "01", *names)
    with pytest.raises(ValueError, match="No valid samples found in") as error:
        find_samples(tmp_path / "data")
    assert f"{folder}: " in str(error.value)
    assert message in str(error.value)


def test_no_valid_samples_names_where_it_looked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with pytest.raises(ValueError, match=r"No valid samples found: .*data is not there"):
        find_samples(data)
    touch(data / "test" / "01", *NEW)
    touch(data, "train")
    touch(data / "training", *NEW)
    with pytest.raises(ValueError, match="No valid samples found") as error:
        find_samples(data)
    for part in (
        f"{data / 'training'}: no sub-folder; it holds input.mp4, input.wav, output.wav",
        f"{data / 'train'}: a file, not a folder",
        f"Instead, {data} holds test/, train, training/.",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"found: .*input\.mp4 is a file; give the folder around"):
        find_samples(data / "training" / "input.mp4")
    folder = data / "test" / "02" / "input.mp4"
    folder.mkdir(parents=True)
    assert "it holds input.mp4/ instead" in list_sample_folders(data / "test")[1].problem
    with pytest.raises(ValueError, match="split=train: choose from training, test"):
        find_split(data, "train")


def test_a_transcript_is_one_segment_whatever_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "output.txt"
    path.write_bytes("\ufeffIt is red.\r\n  Fünf  Äpfel.\n".encode())
    assert read_transcript(path) == "It is red. Fünf Äpfel."
    for content, message in ((b" \n", "empty; write"), (b"caf\xe9", "not UTF-8 .*; save it as")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"output\.txt: {message}"):
            read_transcript(path)
