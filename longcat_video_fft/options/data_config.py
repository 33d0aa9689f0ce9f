"""The options of databackend*.json: where the videos are, how they are cut, where caches go.

The file is a list of two objects, told apart by `dataset_type`: the videos and the text
embeddings. Names are the source document's. What it names and this folder cannot do is refused
with the reason; relative paths count from the file's own folder.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from longcat_video_fft.options.buckets import DEFAULT_FRAMES, MAX_FRAMES, SHAPES_480P, BucketRule
from longcat_video_fft.options.config import check_values, read_json
from longcat_video_fft.options.data_rules import (
    check_caches,
    check_frames,
    check_picture,
    check_source,
)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class VideoOptions:
    """`video`: lengths and rates."""

    num_frames: int = 93
    frame_buckets: list[int] | None = None  # null: 93 and 73 where num_frames is 93
    target_fps: float | str = 15.0  # "native": the file's own frames one by one
    min_frames: int = 1  # of the file; shorter and longer ones are left out
    max_frames: int | None = None
    bucket_strategy: str = "aspect_ratio"
    frame_interval: int = 4
    is_i2v: bool = False


@dataclass(kw_only=True)
class ParquetOptions:
    """`parquet`: scripts/generate_metadata_parquet.py's table, or one of the user's."""

    path: str = ""
    filename_column: str = "filename"
    caption_column: str = "caption"
    fallback_caption_column: str | None = None
    width_column: str = "width"
    height_column: str = "height"
    identifier_includes_extension: bool = True


@dataclass(kw_only=True)
class VideoData:
    """The data set of videos."""

    id: str = "videos"
    type: str = "local"
    dataset_type: str = "video"
    instance_data_dir: str = ""  # type local: the folder
    aws_bucket_name: str | None = None
    aws_region_name: str | None = None
    aws_endpoint_url: str | None = None
    aws_access_key_id: str | None = field(default=None, repr=False)
    aws_secret_access_key: str | None = field(default=None, repr=False)
    aws_data_prefix: str = ""

    metadata_backend: str = "discovery"
    parquet: dict[str, Any] = field(default_factory=dict)
    skip_file_discovery: str = ""
    preserve_data_backend_cache: bool = False
    caption_strategy: str = "textfile"
    instance_prompt: str | None = None  # caption_strategy instanceprompt

    resolution: str | int | float | list[Any] = "480p"
    resolution_type: str | None = None
    minimum_image_size: int | None = None  # pixels of the shorter side; smaller are left out
    crop: bool = True
    crop_style: str = "center"
    crop_aspect: str = "preserve"
    video: dict[str, Any] = field(default_factory=dict)

    cache_dir_vae: str = ""
    repeats: int = 0  # 0: once an epoch

    @property
    def skipped_scans(self) -> set[str]:
        return set(self.skip_file_discovery.replace(",", " ").split())


@dataclass(kw_only=True)
class TextEmbeds:
    """Where caption embeddings go."""

    id: str = "text-embeds"
    type: str = "local"
    dataset_type: str = "text_embeds"
    default: bool = True
    cache_dir: str = ""
    write_batch_size: int = 128  # captions a write
    text_encoder_batch_size: int = 32  # captions a call


@dataclass(frozen=True)
class DataConfig:
    """A checked databackend file."""

    source: Path
    videos: VideoData
    options: VideoOptions
    parquet: ParquetOptions
    text: TextEmbeds
    rule: BucketRule

    def path(self, text: str) -> Path:
        """A path of the file's, from the file's own folder where it is relative."""
        return self.source.parent / Path(text).expanduser()

    @property
    def latent_cache(self) -> Path:
        return self.path(self.videos.cache_dir_vae)

    @property
    def text_cache(self) -> Path:
        return self.path(self.text.cache_dir)


# Keys of the source's tool that are known and refused, with the reason and what to do.
REFUSED: dict[str, str] = {
    "maximum_image_size": "a picture is resized once, straight to its shape; delete the line",
    "target_downsample_size": (
        "a picture is resized once, straight to its shape, and 512 pixels first would blur it; "
        "delete the line"
    ),
    "vae_cache_ondemand": "latents are always made before the training; delete the line",
    "vae_cache_disable": "latents are always made before the training; delete the line",
    "vae_cache_clear_each_epoch": "latents do not change between epochs; delete the line",
    "scan_for_errors": "run precompute with --verify instead, which checks every checksum",
    "hash_filenames": "samples lie in shards, not in files of their own; delete the line",
    "compress_disk_cache": "bf16 latents of noise-like values do not compress; delete the line",
    "crop_aspect_buckets": 'give shapes as resolution: [[height, width], ...], or "480p"',
    "conditioning_data": "the transformer has no such input; delete the line",
    "disabled": "delete the whole object instead",
    "probability": "there is one data set of videos; delete the line",
}


def load_data_config(path: Path) -> DataConfig:
    """Reads and checks a databackend file.

    Raises:
        ValueError: what is wrong, with the file and the field.
    """
    raw = read_json(path)
    if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
        raise ValueError(f"{path}: must be a list of objects, as databackend.json is.")
    videos = VideoData(**_read(_pick(raw, "video", path), VideoData, str(path)))
    text = TextEmbeds(**_read(_pick(raw, "text_embeds", path), TextEmbeds, str(path)))
    options = VideoOptions(**_read(videos.video, VideoOptions, f"{path}: video"))
    parquet = ParquetOptions(**_read(videos.parquet, ParquetOptions, f"{path}: parquet"))
    for complaint in (
        *check_source(videos, parquet),
        *check_picture(videos),
        *check_frames(options),
        *check_caches(videos, text),
    ):
        raise ValueError(f"{path}: {complaint}")
    if videos.aws_secret_access_key or videos.aws_access_key_id:
        logger.warning(
            "%s holds an AWS key. Whoever reads the file has it: export AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY instead, which win over the file.",
            path,
        )
    return DataConfig(path, videos, options, parquet, text, _build_rule(videos, options))


def _pick(raw: list[dict[str, Any]], kind: str, path: Path) -> dict[str, Any]:
    found = [item for item in raw if item.get("dataset_type") == kind]
    others = {str(item.get("dataset_type")) for item in raw} - {"video", "text_embeds"}
    if others:
        raise ValueError(
            f"{path}: dataset_type {', '.join(sorted(others))} is not known here; there are one "
            '"video" and one "text_embeds".'
        )
    if len(found) != 1:
        raise ValueError(
            f'{path}: has {len(found)} objects with dataset_type "{kind}" and needs one. Videos of '
            "several sources go below one prefix or folder."
        )
    return found[0]


def _read(raw: dict[str, Any], kind: type, source: str) -> dict[str, Any]:
    for key in raw:
        if key in REFUSED:
            raise ValueError(f"{source}: {key} is refused: {REFUSED[key]}.")
    if raw.get("disable_multiline_split") is True:  # what is done anyway
        raw = {key: value for key, value in raw.items() if key != "disable_multiline_split"}
    elif "disable_multiline_split" in raw:
        raise ValueError(
            f"{source}: disable_multiline_split=false is refused: a caption of several lines is "
            "one caption; delete the line."
        )
    types = get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    return check_values(raw, {key: types[key] for key in names}, source)


def _build_rule(v: VideoData, o: VideoOptions) -> BucketRule:
    shapes = SHAPES_480P
    if isinstance(v.resolution, list):
        shapes = {height / width: (height, width) for height, width in v.resolution}
    frames = o.frame_buckets or (DEFAULT_FRAMES if o.num_frames == MAX_FRAMES else [o.num_frames])
    return BucketRule(
        shapes=tuple(shapes.items()),
        frames=tuple(sorted(set(frames), reverse=True)),
        target_fps=None if o.target_fps == "native" else float(o.target_fps),
        crop=v.crop,
    )
