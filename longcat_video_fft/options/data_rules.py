"""Which values of databackend*.json cannot work, and what to do: a list of problems each.

`load.load_data_config` calls these and reports the first, with the file's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longcat_video_fft.options.buckets import MAX_FRAMES, TOKEN_STRIDE

if TYPE_CHECKING:
    from longcat_video_fft.options.data_config import (
        ParquetOptions,
        TextEmbeds,
        VideoData,
        VideoOptions,
    )

SCANS = ("vae", "aspect", "metadata", "text")

# Keys of the source's tool that are known and not supported, with the reason and what to do.
UNSUPPORTED: dict[str, str] = {
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


def check_source(v: VideoData, parquet: ParquetOptions) -> list[str]:
    problems = _check_choices(
        v,
        {
            "type": ("aws", "local"),
            "metadata_backend": ("discovery", "parquet"),
            "caption_strategy": ("textfile", "parquet", "filename", "instanceprompt"),
        },
    )
    if v.type == "aws" and not v.aws_bucket_name:
        problems.append("aws_bucket_name is needed with type aws.")
    if v.type == "aws" and v.instance_data_dir:
        problems.append("instance_data_dir belongs to type local; use aws_data_prefix.")
    if v.type == "local" and not v.instance_data_dir:
        problems.append("instance_data_dir, the folder of the videos, is needed with type local.")
    unknown = v.skipped_scans - set(SCANS)
    if unknown:
        problems.append(
            f"skip_file_discovery names {', '.join(sorted(unknown))}; known are {', '.join(SCANS)}."
        )
    if "parquet" in (v.metadata_backend, v.caption_strategy) and not parquet.path:
        problems.append("parquet.path is needed with the parquet backend or captions.")
    if v.caption_strategy == "parquet" and v.metadata_backend != "parquet":
        problems.append(
            'caption_strategy="parquet" reads the table of metadata_backend="parquet"; set both.'
        )
    if v.caption_strategy == "instanceprompt" and not v.instance_prompt:
        problems.append('instance_prompt is needed with caption_strategy="instanceprompt".')
    if v.repeats < 0:
        problems.append(f"repeats={v.repeats} must be 0 (once an epoch) or more.")
    return problems


def find_placeholders(v: VideoData) -> list[str]:
    """Returns the fields that still hold what the shipped files have in place of the user's own."""
    names = ("aws_bucket_name", "aws_region_name", "aws_access_key_id", "aws_secret_access_key")
    texts = {name: str(getattr(v, name) or "") for name in names}
    return [n for n, text in texts.items() if text.startswith(("YOUR_", "SEU_", "SUA_", "sua-"))]


def check_placeholders(v: VideoData) -> list[str]:
    return [
        f"{name} still holds the placeholder; put yours in"
        + (", or delete the line and export the key." if "key" in name else ".")
        for name in find_placeholders(v)
    ]


def check_picture(v: VideoData) -> list[str]:
    problems: list[str] = []
    if isinstance(v.resolution, list):
        by_ratio: dict[float, list[int]] = {}
        for shape in v.resolution:
            is_pair = isinstance(shape, list) and len(shape) == 2
            if not is_pair or any(type(n) is not int or n < 1 or n % TOKEN_STRIDE for n in shape):
                problems.append(
                    f"resolution: {shape!r} is not [height, width] in multiples of {TOKEN_STRIDE} "
                    "(8 of the VAE x 2 of the transformer)."
                )
            elif by_ratio.setdefault(shape[0] / shape[1], shape) != shape:
                problems.append(
                    f"resolution: {by_ratio[shape[0] / shape[1]]} and {shape} have one ratio, "
                    "which chooses the shape; delete one."
                )
        if not v.resolution:
            problems.append("resolution=[] has no shape.")
    elif v.resolution != "480p":
        pixels = f"{v.resolution}^2 pixels" if v.resolution == 480 else "so many pixels"
        problems.append(
            f"resolution={v.resolution!r} with resolution_type={v.resolution_type!r} is not "
            f"supported: by pixel_area it means {pixels} (480 gives 230 thousand, about "
            '640x384), by pixel a shorter side of that length. Write "480p" for the official '
            "shapes (832x480 and 25 others of about 399 thousand pixels), or a list of "
            "[height, width]."
        )
    if v.resolution == "480p" and v.resolution_type not in (None, "480p"):
        problems.append(
            f'resolution_type={v.resolution_type!r} contradicts resolution="480p", which names the '
            "official shapes; delete the line."
        )
    if v.crop_style not in ("center", "centre"):  # codespell:ignore centre
        problems.append(
            f"crop_style={v.crop_style!r} is not supported: a latent is made once and holds one "
            'cut; set it to "center".'
        )
    if v.crop_aspect not in ("preserve", "closest"):
        problems.append(
            f"crop_aspect={v.crop_aspect!r} is not supported: a video gets the shape nearest to "
            'its own; set it to "preserve", or list shapes as resolution.'
        )
    return problems


def check_frames(o: VideoOptions) -> list[str]:
    problems: list[str] = []
    lengths = o.frame_buckets or [o.num_frames]
    for length in lengths:
        if type(length) is not int or length < 1 or (length - 1) % 4 or length > MAX_FRAMES:
            problems.append(
                f"video: {length!r} frames are not supported: a length is 4n + 1 (the VAE packs 4 "
                f"frames into one) and at most {MAX_FRAMES}, the longest that the model was "
                "trained on."
            )
    if o.frame_buckets and not problems and max(o.frame_buckets) != o.num_frames:
        problems.append(
            f"video: num_frames={o.num_frames} must be the longest of frame_buckets="
            f"{o.frame_buckets}."
        )
    is_rate = isinstance(o.target_fps, float) and 0 < o.target_fps <= 240
    if not is_rate and o.target_fps != "native":
        problems.append(
            f'video: target_fps={o.target_fps!r} must be a rate (the model\'s is 15) or "native".'
        )
    if o.bucket_strategy != "aspect_ratio":
        problems.append(
            f"video: bucket_strategy={o.bucket_strategy!r} is not supported: videos are put "
            'together by shape and by frame_buckets; set it to "aspect_ratio".'
        )
    if o.frame_interval != 4:
        problems.append(
            f"video: frame_interval={o.frame_interval} is not supported: the VAE packs 4 "
            "frames; set 4."
        )
    if o.is_i2v:
        problems.append(
            "video: is_i2v=true is not supported: latents are the same for all tasks, and the "
            "training's config chooses between them; delete the line."
        )
    if o.min_frames < 1 or (o.max_frames is not None and o.max_frames < o.min_frames):
        problems.append(
            f"video: min_frames={o.min_frames} and max_frames={o.max_frames} leave no video."
        )
    return problems


def check_caches(v: VideoData, text: TextEmbeds) -> list[str]:
    problems: list[str] = []
    if not v.cache_dir_vae:
        problems.append("cache_dir_vae, the folder for latents, is needed.")
    if not text.cache_dir:
        problems.append("cache_dir, the folder for text embeddings, is needed.")
    if v.cache_dir_vae and v.cache_dir_vae == text.cache_dir:
        problems.append("cache_dir_vae and cache_dir must be two folders.")
    if text.type != "local":
        problems.append(f'text_embeds: type={text.type!r} is not supported; set it to "local".')
    if not text.default:
        problems.append(
            "text_embeds: default=false is not supported: there is one; set it to true."
        )
    for name in ("write_batch_size", "text_encoder_batch_size"):
        if getattr(text, name) < 1:
            problems.append(f"text_embeds: {name}={getattr(text, name)} must be above 0.")
    return problems


def _check_choices(options: Any, choices: dict[str, tuple[str, ...]]) -> list[str]:
    return [
        f"{name}={getattr(options, name)!r} is not one of {', '.join(known)}."
        for name, known in choices.items()
        if getattr(options, name) not in known
    ]
