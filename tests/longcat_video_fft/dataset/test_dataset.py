"""Micro-batches out of caches: shapes, padding, loader workers, mistakes, and the same from S3."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from longcat_video_fft.dataset.cache import CorruptEntryError, ShardWriter
from longcat_video_fft.dataset.captions import EMPTY_CAPTION, caption_id
from longcat_video_fft.dataset.latents import Batch, LatentDataset
from longcat_video_fft.dataset.samples import SAMPLES
from longcat_video_fft.options.buckets import Bucket
from longcat_video_fft.options.load import load_data_config
from tests.longcat_video_fft.support.s3_server import put_objects

if TYPE_CHECKING:
    from pathlib import Path

    from longcat_video_fft.options.data_config import DataConfig

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 24
LONG, SHORT = Bucket(9, 32, 48), Bucket(5, 48, 32)
NUM_SAMPLES = 23
CAPTIONS = {caption_id(f"caption {n}"): 3 + n for n in range(6)} | {caption_id("long"): 512}


@dataclass(frozen=True)
class Caches:
    folder: Path
    latents: dict[str, Tensor]
    buckets: dict[str, Bucket]
    captions: dict[str, str]  # caption id by sample
    embeds: dict[str, Tensor]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    """Makes two caches in two shards each, of two writers, as two processes leave them."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("caches")
    names = [f"part{n % 3}/{n:02d}.mp4" for n in range(NUM_SAMPLES)]
    buckets = {name: SHORT if n % 3 == 0 else LONG for n, name in enumerate(names)}
    latents = {
        name: torch.randn(bucket.latent_shape, dtype=torch.bfloat16)
        for name, bucket in buckets.items()
    }
    lengths = {EMPTY_CAPTION: 1} | CAPTIONS
    embeds = {
        name: torch.randn(length, WIDTH, dtype=torch.bfloat16) for name, length in lengths.items()
    }
    write_shards(
        folder / "vae",
        [(name, latents[name], str(bucket), 1000 + n) for n, (name, bucket) in
         enumerate(buckets.items())],
    )  # fmt: skip
    write_shards(folder / "text", [(name, tensor, "", 0) for name, tensor in embeds.items()])
    chosen = list(CAPTIONS)
    captions = {name: chosen[n % len(chosen)] for n, name in enumerate(names)}
    table = {
        "filename": names,
        "size": [1000 + n for n in range(NUM_SAMPLES)],
        # Headers promised more for sample 0 than was decoded; what is cached counts.
        "bucket": [str(LONG)] + [str(buckets[name]) for name in names[1:]],
        "caption_id": [captions[name] for name in names],
    }
    pq.write_table(pa.table(table), folder / "vae" / SAMPLES)
    return Caches(folder, latents, buckets, captions, embeds)


def write_shards(folder: Path, items: list[tuple[str, Tensor, str, int]]) -> None:
    folder.mkdir()
    for rank in range(2):
        writer = ShardWriter(folder, rank)
        writer.write(items[rank::2])
        writer.close()


def configure(folder: Path, vae: Path | str, text: Path | str, **videos: Any) -> DataConfig:
    path = folder / "databackend.json"
    first = {"dataset_type": "video", "instance_data_dir": "x", "cache_dir_vae": str(vae)}
    second = {"dataset_type": "text_embeds", "cache_dir": str(text)}
    path.write_text(json.dumps([first | videos, second]))
    return load_data_config(path)


@pytest.fixture
def data(caches: Caches, tmp_path: Path) -> DataConfig:
    return configure(tmp_path, caches.folder / "vae", caches.folder / "text")


def read_all(dataset: LatentDataset) -> list[Batch]:
    return [dataset[position] for position in range(dataset.order.epoch_length)]


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.names, one.bucket, one.position) == (other.names, other.bucket, other.position)
    for field in ("latents", "caption_embeds", "caption_mask"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


def test_a_batch_holds_what_was_written(caches: Caches, data: DataConfig) -> None:
    batches = read_all(LatentDataset(data, batch_size=3, seed=42))
    names = [name for batch in batches for name in batch.names]
    assert sorted(names) == sorted(caches.latents)
    for position, batch in enumerate(batches):
        size = len(batch.names)
        assert batch.position == position
        assert batch.latents.shape == (size, *batch.bucket.latent_shape)
        assert batch.caption_embeds.shape == (size, 512, WIDTH)
        assert batch.caption_mask.shape == (size, 512)
        assert batch.latents.dtype == batch.caption_embeds.dtype == torch.bfloat16
        assert batch.caption_mask.dtype == torch.bool
        for row, name in enumerate(batch.names):
            assert batch.bucket == caches.buckets[name]
            assert torch.equal(batch.latents[row], caches.latents[name])
            embeds = caches.embeds[caches.captions[name]]
            length = len(embeds)
            assert torch.equal(batch.caption_embeds[row, :length], embeds)
            assert not batch.caption_embeds[row, length:].any()
            assert batch.caption_mask[row].tolist() == [True] * length + [False] * (512 - length)


def test_the_empty_caption(caches: Caches, data: DataConfig) -> None:
    embeds, mask = LatentDataset(data, batch_size=1, seed=0).empty_caption()
    assert embeds.shape == (1, 512, WIDTH)
    assert torch.equal(embeds[0, :1], caches.embeds[EMPTY_CAPTION])
    assert not embeds[0, 1:].any()
    assert mask.tolist() == [[True] + [False] * 511]


def test_seed_and_repeats_reach_the_order(caches: Caches, tmp_path: Path) -> None:
    folders = caches.folder / "vae", caches.folder / "text"
    plain = LatentDataset(configure(tmp_path, *folders), batch_size=1, seed=1)
    other = LatentDataset(configure(tmp_path, *folders), batch_size=1, seed=2)
    twice = LatentDataset(configure(tmp_path, *folders, repeats=1), batch_size=1, seed=1)
    assert twice.order.epoch_length == 2 * plain.order.epoch_length
    assert [b.names for b in read_all(plain)] != [b.names for b in read_all(other)]


@pytest.mark.parametrize("world", [1, 2])
def test_loader_workers_change_nothing(data: DataConfig, world: int) -> None:
    """They run over an epoch's end, from a resumed position."""
    dataset = LatentDataset(data, batch_size=2, seed=42)
    start, stop = 3, 2 * dataset.order.epoch_length
    for rank in range(world):
        positions = range(start + rank, stop, world)
        loader = DataLoader(dataset, sampler=positions, batch_size=None, num_workers=2)
        loaded = list(loader)
        assert [batch.position for batch in loaded] == list(positions)
        fresh = LatentDataset(data, batch_size=2, seed=42)
        for batch in loaded:
            assert_same(batch, fresh[batch.position])


def test_samples_that_one_cache_lacks_are_left_out(caches: Caches, tmp_path: Path) -> None:
    """These are videos that could not be decoded, and files that changed since they were
    encoded."""
    for name in ("vae", "text"):
        shutil.copytree(caches.folder / name, tmp_path / name)
    table = pq.read_table(tmp_path / "vae" / SAMPLES).to_pydict()
    table["size"][4] += 1  # another version of this file
    table["caption_id"][5] = caption_id("never embedded")
    table["filename"][6] = "never/decoded.mp4"
    pq.write_table(pa.table(table), tmp_path / "vae" / SAMPLES)
    dataset = LatentDataset(configure(tmp_path, "vae", "text"), batch_size=1, seed=0)
    left = {name for batch in read_all(dataset) for name in batch.names}
    gone = {name for n, name in enumerate(caches.latents) if n in (4, 5, 6)}
    assert left == set(caches.latents) - gone


def test_a_missing_cache_is_reported(caches: Caches, tmp_path: Path) -> None:
    text = caches.folder / "text"
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        LatentDataset(configure(tmp_path, "nowhere", text), batch_size=1, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty.*samples\.parquet.*precompute"):
        LatentDataset(configure(tmp_path, "empty", text), batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"hold no sample\. Run longcat_video_fft\.precompute"):
        LatentDataset(configure(tmp_path, caches.folder / "vae", "empty"), batch_size=1, seed=0)


def test_without_an_empty_caption(caches: Caches, data: DataConfig) -> None:
    dataset = LatentDataset(data, batch_size=1, seed=0)
    del dataset.text_cache.entries[EMPTY_CAPTION]
    with pytest.raises(ValueError, match=r"text: no empty caption; precompute"):
        dataset.empty_caption()


def test_a_wrong_byte_is_found(caches: Caches, tmp_path: Path) -> None:
    shutil.copytree(caches.folder / "vae", tmp_path / "vae")
    data = configure(tmp_path, "vae", caches.folder / "text")
    dataset = LatentDataset(data, batch_size=1, seed=0)
    (name,) = dataset[0].names
    entry = dataset.latent_cache.find(name)
    assert entry is not None
    shard = tmp_path / "vae" / entry.shard
    content = bytearray(shard.read_bytes())
    content[entry.offset + 7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptEntryError, match=rf"{name}.*--verify --repair"):
        dataset[0]


@pytest.fixture(scope="module")
def s3_copy(caches: Caches, s3_url: str) -> str:
    """Returns the bucket that the caches were copied to as they are."""
    objects = {
        f"copy/{path.relative_to(caches.folder)}": path.read_bytes()
        for path in sorted(caches.folder.rglob("*"))
        if path.is_file()
    }
    put_objects(s3_url, "caches", objects)
    return "caches"


@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_caches_in_s3_are_the_same(
    data: DataConfig, s3_url: str, s3_copy: str, tmp_path: Path, start_method: str
) -> None:
    """They are read here and by the loader's workers, however these start."""
    vae, text = f"s3://{s3_copy}/copy/vae", f"s3://{s3_copy}/copy/text"
    remote = configure(tmp_path, vae, text, aws_endpoint_url=s3_url)
    here, there = (LatentDataset(d, batch_size=4, seed=7) for d in (data, remote))
    assert there.latent_cache.storage.location == vae
    local = read_all(here)
    for one, other in zip(local, read_all(there), strict=True):
        assert_same(one, other)
    if start_method == "forkserver":  # a server that runs already does not know the credentials
        forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    loader = DataLoader(
        there, sampler=range(here.order.epoch_length), batch_size=None, num_workers=2, timeout=300,
        multiprocessing_context=start_method,
    )  # fmt: skip
    for one, other in zip(local, loader, strict=True):
        assert_same(one, other)
