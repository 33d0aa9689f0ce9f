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

from longcat_video_fft.buckets import (
    DEFAULT_FRAMES,
    MAX_FRAMES,
    SHAPES_480P,
    TOKEN_STRIDE,
    BucketRule,
)
from longcat_video_fft.config import check_values, read_json

logger = logging.getLogger(__name__)

SCANS = ("vae", "aspect", "metadata", "text")


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
        *_check_source(videos, parquet),
        *_check_picture(videos),
        *_check_frames(options),
        *_check_caches(videos, text),
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


def _check_source(v: VideoData, parquet: ParquetOptions) -> list[str]:
    complaints = _check_choices(
        v,
        {
            "type": ("aws", "local"),
            "metadata_backend": ("discovery", "parquet"),
            "caption_strategy": ("textfile", "parquet", "filename", "instanceprompt"),
        },
    )
    if v.type == "aws" and not v.aws_bucket_name:
        complaints.append("aws_bucket_name is needed with type aws.")
    if v.type == "aws" and v.instance_data_dir:
        complaints.append("instance_data_dir belongs to type local; use aws_data_prefix.")
    if v.type == "local" and not v.instance_data_dir:
        complaints.append("instance_data_dir, the folder of the videos, is needed with type local.")
    for name in ("bucket_name", "region_name", "access_key_id", "secret_access_key"):
        value = str(getattr(v, f"aws_{name}") or "")
        if value.startswith(("YOUR_", "SEU_", "SUA_", "sua-")):
            complaints.append(
                f"aws_{name} still holds the placeholder; put yours in"
                + (", or delete the line and export the key." if "key" in name else ".")
            )
    unknown = v.skipped_scans - set(SCANS)
    if unknown:
        complaints.append(
            f"skip_file_discovery names {', '.join(sorted(unknown))}; known are {', '.join(SCANS)}."
        )
    if "parquet" in (v.metadata_backend, v.caption_strategy) and not parquet.path:
        complaints.append("parquet.path is needed with the parquet backend or captions.")
    if v.caption_strategy == "parquet" and v.metadata_backend != "parquet":
        complaints.append(
            'caption_strategy="parquet" reads the table of metadata_backend="parquet"; set both.'
        )
    if v.caption_strategy == "instanceprompt" and not v.instance_prompt:
        complaints.append('instance_prompt is needed with caption_strategy="instanceprompt".')
    if v.repeats < 0:
        complaints.append(f"repeats={v.repeats} must be 0 (once an epoch) or more.")
    return complaints


def _check_picture(v: VideoData) -> list[str]:
    complaints: list[str] = []
    if isinstance(v.resolution, list):
        by_ratio: dict[float, list[int]] = {}
        for shape in v.resolution:
            is_pair = isinstance(shape, list) and len(shape) == 2
            if not is_pair or any(type(n) is not int or n < 1 or n % TOKEN_STRIDE for n in shape):
                complaints.append(
                    f"resolution: {shape!r} is not [height, width] in multiples of {TOKEN_STRIDE} "
                    "(8 of the VAE x 2 of the transformer)."
                )
            elif by_ratio.setdefault(shape[0] / shape[1], shape) != shape:
                complaints.append(
                    f"resolution: {by_ratio[shape[0] / shape[1]]} and {shape} have one ratio, "
                    "which chooses the shape; delete one."
                )
        if not v.resolution:
            complaints.append("resolution=[] has no shape.")
    elif v.resolution != "480p":
        pixels = f"{v.resolution}^2 pixels" if v.resolution == 480 else "so many pixels"
        complaints.append(
            f"resolution={v.resolution!r} with resolution_type={v.resolution_type!r} is refused: "
            f"by pixel_area it means {pixels} (480 gives 230 thousand, about 640x384), by pixel a "
            'shorter side of that length. Write "480p" for the official shapes (832x480 and 25 '
            "others of about 399 thousand pixels), or a list of [height, width]."
        )
    if v.resolution == "480p" and v.resolution_type not in (None, "480p"):
        complaints.append(
            f'resolution_type={v.resolution_type!r} contradicts resolution="480p", which names the '
            "official shapes; delete the line."
        )
    if v.crop_style not in ("center", "centre"):
        complaints.append(
            f"crop_style={v.crop_style!r} is refused: a latent is made once and holds one cut; "
            'set it to "center".'
        )
    if v.crop_aspect not in ("preserve", "closest"):
        complaints.append(
            f"crop_aspect={v.crop_aspect!r} is refused: a video gets the shape nearest to its own; "
            'set it to "preserve", or list shapes as resolution.'
        )
    return complaints


def _check_frames(o: VideoOptions) -> list[str]:
    complaints: list[str] = []
    lengths = o.frame_buckets or [o.num_frames]
    for length in lengths:
        if type(length) is not int or length < 1 or (length - 1) % 4 or length > MAX_FRAMES:
            complaints.append(
                f"video: {length!r} frames are refused: a length is 4n + 1 (the VAE packs 4 frames "
                f"into one) and at most {MAX_FRAMES}, the longest that the model was trained on."
            )
    if o.frame_buckets and not complaints and max(o.frame_buckets) != o.num_frames:
        complaints.append(
            f"video: num_frames={o.num_frames} must be the longest of frame_buckets="
            f"{o.frame_buckets}."
        )
    is_rate = isinstance(o.target_fps, float) and 0 < o.target_fps <= 240
    if not is_rate and o.target_fps != "native":
        complaints.append(
            f'video: target_fps={o.target_fps!r} must be a rate (the model\'s is 15) or "native".'
        )
    if o.bucket_strategy != "aspect_ratio":
        complaints.append(
            f"video: bucket_strategy={o.bucket_strategy!r} is refused: videos are put together by "
            'shape and by frame_buckets; set it to "aspect_ratio".'
        )
    if o.frame_interval != 4:
        complaints.append(
            f"video: frame_interval={o.frame_interval} is refused: the VAE packs 4 frames; set 4."
        )
    if o.is_i2v:
        complaints.append(
            "video: is_i2v=true is refused: latents are the same for all tasks, and the training's "
            "config chooses between them; delete the line."
        )
    if o.min_frames < 1 or (o.max_frames is not None and o.max_frames < o.min_frames):
        complaints.append(
            f"video: min_frames={o.min_frames} and max_frames={o.max_frames} leave no video."
        )
    return complaints


def _check_caches(v: VideoData, text: TextEmbeds) -> list[str]:
    complaints: list[str] = []
    if not v.cache_dir_vae:
        complaints.append("cache_dir_vae, the folder for latents, is needed.")
    if not text.cache_dir:
        complaints.append("cache_dir, the folder for text embeddings, is needed.")
    if v.cache_dir_vae and v.cache_dir_vae == text.cache_dir:
        complaints.append("cache_dir_vae and cache_dir must be two folders.")
    if text.type != "local":
        complaints.append(f'text_embeds: type={text.type!r} is refused; set it to "local".')
    if not text.default:
        complaints.append("text_embeds: default=false is refused: there is one; set it to true.")
    for name in ("write_batch_size", "text_encoder_batch_size"):
        if getattr(text, name) < 1:
            complaints.append(f"text_embeds: {name}={getattr(text, name)} must be above 0.")
    return complaints


def _check_choices(options: Any, choices: dict[str, tuple[str, ...]]) -> list[str]:
    return [
        f"{name}={getattr(options, name)!r} is not one of {', '.join(known)}."
        for name, known in choices.items()
        if getattr(options, name) not in known
    ]


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
