"""The tables of a preparation beside its shards: what is cached, for whoever reads a cache.

`precompute/survey.py` writes them; the preparation, the training and the plan read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from longcat_video_fft.options.buckets import Bucket, parse_bucket

if TYPE_CHECKING:
    from longcat_video_fft.storage.storage import Storage

SAMPLES, CAPTIONS, METADATA = "samples.parquet", "captions.parquet", "metadata.parquet"


def read_samples(storage: Storage) -> list[tuple[str, int, Bucket, str]]:
    """Returns (filename, size, promised bucket, caption id) of a latent cache, in work order."""
    table = pq.read_table(pa.BufferReader(storage.read(SAMPLES))).to_pydict()
    buckets = {text: parse_bucket(text) for text in set(table["bucket"])}
    return [
        (name, size, buckets[bucket], caption)
        for name, size, bucket, caption in zip(
            table["filename"], table["size"], table["bucket"], table["caption_id"], strict=True
        )
    ]


def read_captions(storage: Storage) -> list[tuple[str, str, int]]:
    """Returns (caption id, cleaned caption, tokens) of a text cache, in the order of work."""
    table = pq.read_table(pa.BufferReader(storage.read(CAPTIONS))).to_pydict()
    return list(zip(table["caption_id"], table["caption"], table["num_tokens"], strict=True))
