"""Opens what a databackend file names: the videos, and caches in a folder or in S3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longcat_video_fft.dataset.cache import TensorCache
from longcat_video_fft.storage.storage import LocalStorage, Storage

if TYPE_CHECKING:
    from longcat_video_fft.options.data_config import DataConfig, VideoData

S3_SCHEME = "s3://"


def open_videos(data: DataConfig) -> Storage:
    """Opens the videos; raises ValueError when the folder, bucket or credentials are wrong."""
    videos = data.videos
    if videos.type == "local":
        return LocalStorage(data.path(videos.instance_data_dir))
    return _open_s3(videos, str(videos.aws_bucket_name), videos.aws_data_prefix)


def open_caches(data: DataConfig) -> tuple[TensorCache, TensorCache]:
    """Opens (latents, caption embeddings) to read from; each may be s3://bucket/prefix."""
    return (
        TensorCache(open_cache_storage(data, data.videos.cache_dir_vae)),
        TensorCache(open_cache_storage(data, data.text.cache_dir)),
    )


def open_cache_storage(data: DataConfig, location: str) -> Storage:
    """Opens the files of a cache."""
    if location.startswith(S3_SCHEME):
        bucket, _, prefix = location.removeprefix(S3_SCHEME).partition("/")
        return _open_s3(data.videos, bucket, prefix)
    return LocalStorage(data.path(location))


def _open_s3(videos: VideoData, bucket: str, prefix: str) -> Storage:
    from longcat_video_fft.storage.s3_storage import (  # boto3: not for local files
        S3Options,
        open_s3,
    )

    options = S3Options(
        bucket=bucket,
        prefix=prefix,
        region=videos.aws_region_name,
        endpoint_url=videos.aws_endpoint_url,
        access_key_id=videos.aws_access_key_id,
        secret_access_key=videos.aws_secret_access_key,
    )
    return open_s3(options)
