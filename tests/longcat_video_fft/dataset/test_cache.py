"""Shards and their index: what is written is read, whenever a writer is killed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from longcat_video_fft.dataset.cache import (
    CorruptEntryError,
    ShardWriter,
    TensorCache,
    reject,
)
from longcat_video_fft.precompute.manifest import check_manifest, digest_folder
from tests.longcat_video_fft.support.tiny import open_folder

if TYPE_CHECKING:
    from pathlib import Path


def write_some(folder: Path, number: int, *, shard_bytes: int = 2000) -> list[torch.Tensor]:
    """Writes `number` bf16 tensors named "0", "1", ..., 240 bytes each."""
    folder.mkdir(exist_ok=True)
    tensors = [torch.randn(4, 5, 6).bfloat16() for _ in range(number)]
    writer = ShardWriter(folder, 3, shard_bytes=shard_bytes)
    for i, tensor in enumerate(tensors):
        writer.write([(str(i), tensor, "5x32x48", 100 + i)])
    writer.close()
    return tensors


def test_tensors_come_back_from_several_shards(tmp_path: Path) -> None:
    tensors = write_some(tmp_path, 20)
    cache = open_folder(tmp_path)
    assert len(list(tmp_path.glob("rank00003-*.shard"))) == 3  # closed at 9 x 240 > 2000
    for i, tensor in enumerate(tensors):
        entry = cache.find(str(i), 100 + i)
        assert entry is not None
        assert (entry.bucket, entry.version, entry.shape) == ("5x32x48", 100 + i, (4, 5, 6))
        assert cache.read(entry).equal(tensor)
    assert cache.find("0", 7) is None  # the file has another size now
    assert cache.find("0") is not None  # size not known
    assert cache.find("20") is None


@pytest.mark.parametrize("lost", [1, 30, 100])
def test_a_torn_index_loses_its_last_line_alone(tmp_path: Path, lost: int) -> None:
    write_some(tmp_path, 4, shard_bytes=10**6)
    (index,) = tmp_path.glob("*.index")
    index.write_bytes(index.read_bytes()[:-lost])
    cache = open_folder(tmp_path)
    assert sorted(cache.entries) == ["0", "1", "2"]
    assert cache.verify() == []


def test_bytes_without_an_index_line_do_not_count(tmp_path: Path) -> None:
    write_some(tmp_path, 2, shard_bytes=10**6)
    (shard,) = tmp_path.glob("*.shard")
    shard.write_bytes(shard.read_bytes() + b"half a tensor")
    assert open_folder(tmp_path).verify() == []


def test_a_flipped_bit_and_a_short_shard_are_found_and_made_again(tmp_path: Path) -> None:
    write_some(tmp_path, 4, shard_bytes=10**6)
    (shard,) = tmp_path.glob("*.shard")
    raw = bytearray(shard.read_bytes())
    raw[250] ^= 1
    shard.write_bytes(raw[:-1])
    cache = open_folder(tmp_path)
    bad = cache.verify()
    assert [entry.id for entry in bad] == ["1", "3"]
    with pytest.raises(CorruptEntryError, match="--verify --repair"):
        cache.read(bad[0])
    reject(tmp_path, bad)
    again = open_folder(tmp_path)
    assert sorted(again.entries) == ["0", "2"]
    assert again.verify() == []


def test_a_full_disk_is_named_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_some(tmp_path, 2)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fdatasync", full)
    with pytest.raises(OSError, match=r"No space left.*free some space") as error:
        ShardWriter(tmp_path, 0).write([("new", torch.zeros(2), "", 0)])
    assert str(tmp_path) in str(error.value)
    assert sorted(open_folder(tmp_path).entries) == ["0", "1"]


def test_a_cache_of_another_maker_is_an_error_by_name(tmp_path: Path) -> None:
    check_manifest(tmp_path, {"vae_sha256": "aa", "target_fps": 15})
    check_manifest(tmp_path, {"vae_sha256": "aa", "target_fps": 15})
    with pytest.raises(ValueError, match="vae_sha256 is 'aa' there and 'bb' here") as error:
        check_manifest(tmp_path, {"vae_sha256": "bb", "target_fps": 15})
    assert "target_fps" not in str(error.value)


def test_a_digest_tells_contents_and_names(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "a.json").write_text("1")
        (folder / "b.json").write_text("2")
    assert digest_folder(one) == digest_folder(two)
    (two / "a.json").write_text("2")
    assert digest_folder(one) != digest_folder(two)
    (two / "a.json").rename(two / "c.json")
    (two / "b.json").rename(two / "d.json")
    assert digest_folder(one) != digest_folder(two)


def test_reading_an_empty_folder(tmp_path: Path) -> None:
    cache = open_folder(tmp_path)
    assert list(cache) == []
    assert isinstance(cache, TensorCache)
