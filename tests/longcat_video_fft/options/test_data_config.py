"""databackend*.json: what the source's files say, what is unsupported and why, that keys stay."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from longcat_video_fft.options.buckets import BucketRule
from longcat_video_fft.options.data_rules import UNSUPPORTED
from longcat_video_fft.options.load import load_data_config
from tests.longcat_video_fft.support.tiny import ROOT

if TYPE_CHECKING:
    from longcat_video_fft.options.data_config import DataConfig

FOLDER = ROOT / "longcat_video_fft"
SHIPPED = ["databackend.json", "databackend-with-parquet.json", "databackend-local.json"]
SECRET = "wJalrXUtnFEMI/K7MDENG"
Object = dict[str, Any]


def load(
    folder: Path, videos: Object | None = None, text: Object | None = None, **video: Any
) -> DataConfig:
    """Reads a sound file with these changes; `video` changes the nested object."""
    first = {
        "id": "videos",
        "type": "local",
        "dataset_type": "video",
        "instance_data_dir": "" if (videos or {}).get("type") == "aws" else "videos",
        "cache_dir_vae": "vae",
        "video": video,
    }
    second = {"id": "text", "dataset_type": "text_embeds", "cache_dir": "text"}
    path = folder / "databackend.json"
    path.write_text(json.dumps([first | (videos or {}), second | (text or {})]))
    return load_data_config(path)


def error_of(folder: Path, *args: Any, **video: Any) -> str:
    """Returns the message that `load` ends with, which names the file."""
    with pytest.raises(ValueError, match=r".") as caught:
        load(folder, *args, **video)
    assert str(caught.value).startswith(f"{folder / 'databackend.json'}: ")
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files(tmp_path: Path, name: str) -> None:
    """All three cut videos alike, so that a cache outlives a change from one to another."""
    path = tmp_path / name
    path.write_text((FOLDER / name).read_text().replace("YOUR_BUCKET_NAME", "films"))
    data = load_data_config(path)
    assert data.rule == BucketRule()
    assert data.rule.frames == (93, 73)
    assert data.rule.target_fps == 15
    assert len(data.rule.shapes) == 26
    assert data.videos.minimum_image_size == 256
    assert (data.options.min_frames, data.options.max_frames) == (1, 500)
    assert data.latent_cache == Path("/mnt/nvme/cache/vae/longcat")
    assert data.text_cache == Path("/mnt/nvme/cache/text/longcat")
    is_parquet = "parquet" in name
    assert data.videos.skipped_scans == ({"vae", "aspect", "metadata"} if is_parquet else set())
    assert data.path(data.parquet.path) == tmp_path / ("metadata.parquet" if is_parquet else "")


@pytest.mark.parametrize("name", SHIPPED[:2])
def test_a_placeholder_is_an_error_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: aws_bucket_name still holds the placeholder"):
        load_data_config(FOLDER / name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("aws_bucket_name", "SEU_BUCKET"),
        ("aws_region_name", "sua-regiao"),
        ("aws_access_key_id", "SUA_ACCESS_KEY"),
        ("aws_secret_access_key", "YOUR_SECRET_KEY"),
    ],
)
def test_the_source_documents_placeholders(tmp_path: Path, key: str, value: str) -> None:
    message = error_of(tmp_path, {"type": "aws", "aws_bucket_name": "films", key: value})
    assert f"{key} still holds the placeholder" in message
    assert ("export the key" in message) == ("key" in key)


def test_480_with_pixel_area_is_an_error_with_both_readings(tmp_path: Path) -> None:
    message = error_of(tmp_path, {"resolution": 480, "resolution_type": "pixel_area"})
    for part in ("pixel_area", "480^2", "230 thousand", "shorter side", '"480p"', "832x480"):
        assert part in message


@pytest.mark.parametrize("place", ["videos", "video", "parquet", "text"])
@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_keys_come_with_their_reason(tmp_path: Path, key: str, place: str) -> None:
    given = {key: 1}
    videos = given if place == "videos" else {place: given} if place in ("video", "parquet") else {}
    message = error_of(tmp_path, videos, given if place == "text" else {})
    assert f"{key} is not supported: {UNSUPPORTED[key]}." in message


@pytest.mark.parametrize(
    ("videos", "text"),
    [
        ({"type": "aws", "aws_bucket_name": "b", "aws_region_name": "us-east-1",
          "aws_endpoint_url": "https://example.com", "aws_data_prefix": "pasta/"}, {}),
        ({"aws_endpoint_url": None, "aws_region_name": None}, {}),
        ({"minimum_image_size": 256, "crop": True, "crop_style": "center",
          "crop_aspect": "preserve"}, {}),
        ({"crop_style": "centre", "crop_aspect": "closest"}, {}),  # codespell:ignore centre
        ({"repeats": 3, "preserve_data_backend_cache": True}, {}),
        ({"skip_file_discovery": "vae,aspect, metadata text"}, {}),
        ({"caption_strategy": "filename"}, {}),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "a dog"}, {}),
        ({"caption_strategy": "parquet", "metadata_backend": "parquet",
          "parquet": {"path": "m.parquet", "fallback_caption_column": "alt",
                      "identifier_includes_extension": False}}, {}),
        ({"metadata_backend": "parquet", "parquet": {"path": "m.parquet"}}, {}),
        ({"disable_multiline_split": True, "_comment": 1}, {"_comment": 2}),
        ({"resolution_type": "480p"}, {}),
        ({}, {"default": True, "write_batch_size": 1, "text_encoder_batch_size": 8}),
    ],
    ids=str,
)  # fmt: skip
def test_accepted(tmp_path: Path, videos: Object, text: Object) -> None:
    data = load(tmp_path, videos, text)
    for options, given in ((data.videos, videos), (data.text, text)):
        for key, value in given.items():
            if key not in ("disable_multiline_split", "_comment"):
                assert getattr(options, key) == value


@pytest.mark.parametrize(
    ("videos", "parts"),
    [
        ({"type": "huggingface"}, ["type='huggingface'", "aws, local"]),
        ({"type": "aws"}, ["aws_bucket_name is needed"]),
        (
            {"type": "aws", "aws_bucket_name": "b", "instance_data_dir": "d"},
            ["instance_data_dir belongs to type local"],
        ),
        ({"instance_data_dir": ""}, ["instance_data_dir", "is needed"]),
        ({"metadata_backend": "webshart"}, ["metadata_backend='webshart'", "discovery, parquet"]),
        ({"caption_strategy": "csv"}, ["caption_strategy='csv'", "textfile", "instanceprompt"]),
        ({"caption_strategy": "instanceprompt"}, ["instance_prompt is needed"]),
        ({"metadata_backend": "parquet"}, ["parquet.path is needed"]),
        ({"caption_strategy": "parquet", "parquet": {"path": "x"}}, ["set both"]),
        ({"skip_file_discovery": "vae,video"}, ["names video", "vae, aspect, metadata, text"]),
        ({"repeats": -1}, ["repeats=-1"]),
        ({"disable_multiline_split": False}, ["disable_multiline_split=false", "one caption"]),
        ({"crop_style": "random"}, ["crop_style='random'", "one cut"]),
        ({"crop_aspect": "square"}, ["crop_aspect='square'", "preserve"]),
        ({"resolution": "720p"}, ["resolution='720p'", '"480p"']),
        ({"resolution": 0.25}, ["resolution=0.25", "pixel_area"]),
        ({"resolution_type": "pixel"}, ["resolution_type='pixel'", "contradicts"]),
        ({"resolution": []}, ["resolution=[] has no shape"]),
        ({"resolution": [[480, 830]]}, ["[480, 830]", "multiples of 16"]),
        ({"resolution": [480, 832]}, ["480 is not [height, width]"]),
        ({"resolution": [[480, 832, 93]]}, ["[480, 832, 93]"]),
        ({"resolution": [[480, "832"]]}, ["[480, '832']"]),
        ({"resolution": [[0, 832]]}, ["[0, 832]"]),
        ({"cache_dir_vae": ""}, ["cache_dir_vae", "is needed"]),
        ({"cache_dir_vae": "text"}, ["must be two folders"]),
        ({"minimum_image_size": "256"}, ["minimum_image_size='256'", "int or null"]),
        ({"crop": "center"}, ["crop='center'", "bool"]),
        ({"video": []}, ["video=[]", "dict"]),
        ({"bucket_name": "x"}, ["'bucket_name'", "'aws_bucket_name'"]),
        ({"video": {"frame_intervall": 4}}, ["video: unknown key", "'frame_interval'"]),
        ({"parquet": {"filename_colum": "x"}}, ["parquet: unknown key", "'filename_column'"]),
        ({"parquet": {"path": 1}}, ["parquet: path=1", "str"]),
        ({"dataset_type": "image"}, ["dataset_type image is not known"]),
        ({"dataset_type": "text_embeds"}, ['0 objects with dataset_type "video"']),
    ],
    ids=str,
)
def test_unsupported(tmp_path: Path, videos: Object, parts: list[str]) -> None:
    message = error_of(tmp_path, videos)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ({"cache_dir": ""}, "cache_dir, the folder for text"),
        ({"type": "aws"}, "text_embeds: type='aws'"),
        ({"default": False}, "default=false is not supported"),
        ({"write_batch_size": 0}, "write_batch_size=0"),
        ({"text_encoder_batch_size": 0}, "text_encoder_batch_size=0"),
        ({"write_batchsize": 2}, "Did you mean 'write_batch_size'"),
        ({"dataset_type": "video"}, '2 objects with dataset_type "video"'),
    ],
    ids=str,
)
def test_unsupported_text_embeds(tmp_path: Path, text: Object, part: str) -> None:
    assert part in error_of(tmp_path, None, text)


@pytest.mark.parametrize(
    ("video", "part"),
    [
        ({"num_frames": 92}, "92 frames are not supported: a length is 4n + 1"),
        ({"num_frames": 97}, "97 frames are not supported"),
        ({"num_frames": 0}, "0 frames are not supported"),
        ({"num_frames": -3}, "-3 frames are not supported"),
        ({"frame_buckets": [93, 72]}, "72 frames are not supported"),
        ({"frame_buckets": [93, "73"]}, "'73' frames are not supported"),
        ({"frame_buckets": [93, None]}, "None frames are not supported"),
        ({"frame_buckets": [73]}, "num_frames=93 must be the longest of frame_buckets=[73]"),
        ({"num_frames": 73, "frame_buckets": [93, 73]}, "num_frames=73 must be the longest"),
        ({"target_fps": "fast"}, "target_fps='fast'"),
        ({"target_fps": 0}, "target_fps=0.0"),
        ({"target_fps": float("nan")}, "target_fps=nan"),
        ({"target_fps": 1e9}, "target_fps=1000000000.0"),
        ({"bucket_strategy": "resolution_frames"}, "bucket_strategy='resolution_frames'"),
        ({"frame_interval": 8}, "frame_interval=8"),
        ({"is_i2v": True}, "is_i2v=true"),
        ({"min_frames": 0}, "min_frames=0"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames=9 and max_frames=8 leave no video"),
    ],
    ids=str,
)
def test_unsupported_lengths_and_rates(tmp_path: Path, video: Object, part: str) -> None:
    assert part in error_of(tmp_path, **video)


@pytest.mark.parametrize(
    ("video", "frames"),
    [
        ({}, (93, 73)),
        ({"num_frames": 93, "frame_buckets": [93]}, (93,)),
        ({"num_frames": 93, "frame_buckets": [73, 93, 49, 73]}, (93, 73, 49)),
        ({"num_frames": 49}, (49,)),
        ({"num_frames": 1}, (1,)),
    ],
    ids=str,
)
def test_lengths(tmp_path: Path, video: Object, frames: tuple[int, ...]) -> None:
    assert load(tmp_path, **video).rule.frames == frames


def test_rates(tmp_path: Path) -> None:
    assert load(tmp_path).rule.target_fps == 15
    assert load(tmp_path, target_fps="native").rule.target_fps is None
    assert load(tmp_path, target_fps=29.97).rule.target_fps == 29.97


def test_shapes_of_ones_own(tmp_path: Path) -> None:
    rule = load(tmp_path, {"resolution": [[480, 832], [832, 480], [640, 640]], "crop": False}).rule
    assert [shape for _, shape in rule.shapes] == [(480, 832), (832, 480), (640, 640)]
    assert rule.choose_shape(1080, 1920) == (480, 832)
    assert rule.choose_shape(500, 490) == (640, 640)
    assert rule.crop is False


def test_two_shapes_of_one_ratio_are_errors(tmp_path: Path) -> None:
    message = error_of(tmp_path, {"resolution": [[32, 48], [64, 96], [48, 48]]})
    assert "[32, 48]" in message
    assert "[64, 96]" in message


def test_a_key_in_the_file_is_warned_of_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"aws_access_key_id": "AKIAIOSFODNN7", "aws_secret_access_key": SECRET}
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path, {"type": "aws", "aws_bucket_name": "films", **keys})
    (warning,) = caplog.messages
    assert "holds an AWS key" in warning
    assert "export AWS_ACCESS_KEY_ID" in warning
    for text in (warning, repr(data), repr(data.videos)):
        assert SECRET not in text
        assert "AKIAIOSFODNN7" not in text
    caplog.clear()
    load(tmp_path)
    assert not caplog.messages


def test_a_key_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    message = error_of(tmp_path, {"aws_secret_access_key": [SECRET]})
    assert "aws_secret_access_key" in message
    assert SECRET not in message


@pytest.mark.parametrize("content", ["{}", "[1]", "[", "[]"])
def test_a_file_of_another_kind(tmp_path: Path, content: str) -> None:
    path = tmp_path / "databackend.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"list of objects|not valid JSON|0 objects"):
        load_data_config(path)


def test_relative_paths_count_from_the_file(tmp_path: Path) -> None:
    data = load(tmp_path)
    assert (data.latent_cache, data.text_cache) == (tmp_path / "vae", tmp_path / "text")
