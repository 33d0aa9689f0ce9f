"""The options of databackend*.json: where the videos are, how they are cut, where caches go.

The file is a list of two objects, distinguished by `dataset_type`: the videos and the text
embeddings; `load.py` reads it. Names are the source document's. What it names and this folder
does not support is an error that says why; relative paths count from the file's own folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_video_fft.options.buckets import BucketRule


@dataclass(kw_only=True)
class VideoOptions:
    """`video` holds lengths and rates."""

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
    """`parquet` names scripts/generate_metadata_parquet.py's table, or one of the user's."""

    path: str = ""
    filename_column: str = "filename"
    caption_column: str = "caption"
    fallback_caption_column: str | None = None
    width_column: str = "width"
    height_column: str = "height"
    identifier_includes_extension: bool = True


@dataclass(kw_only=True)
class VideoData:
    """The first object of the file describes the data set of videos."""

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
    """The second object of the file says where caption embeddings go."""

    id: str = "text-embeds"
    type: str = "local"
    dataset_type: str = "text_embeds"
    default: bool = True
    cache_dir: str = ""
    write_batch_size: int = 128  # captions a write
    text_encoder_batch_size: int = 32  # captions a call


@dataclass(frozen=True)
class DataConfig:
    """A data config is a checked databackend file."""

    source: Path
    videos: VideoData
    options: VideoOptions
    parquet: ParquetOptions
    text: TextEmbeds
    rule: BucketRule
    placeholders: tuple[str, ...] = ()  # fields that still need a value (a dry run's)

    def path(self, text: str) -> Path:
        """Returns a path of the file's, from the file's own folder where it is relative."""
        return self.source.parent / Path(text).expanduser()

    @property
    def latent_cache(self) -> Path:
        return self.path(self.videos.cache_dir_vae)

    @property
    def text_cache(self) -> Path:
        return self.path(self.text.cache_dir)
