"""The caches -> micro-batches, for the training.

    order position -> samples of one bucket -> latents and caption embeddings from their shards

An item is a whole micro-batch; its index is its position in the run (`sampler.py`), so a loader
over `range(start, stop, num_processes)` is all that resuming needs:

    DataLoader(dataset, sampler=range(rank, stop, world_size), batch_size=None, num_workers=2)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from longcat_video_fft.dataset.captions import EMPTY_CAPTION
from longcat_video_fft.dataset.sampler import TrainingOrder, split_held_out
from longcat_video_fft.dataset.samples import SAMPLES, read_samples
from longcat_video_fft.dataset.sources import open_cache_storage, open_caches
from longcat_video_fft.options.buckets import MAX_TOKENS, Bucket, parse_bucket
from longcat_video_fft.storage.storage import ObjectVanishedError

if TYPE_CHECKING:
    from longcat_video_fft.dataset.cache import Entry
    from longcat_video_fft.options.data_config import DataConfig


@dataclass(frozen=True)
class Batch:
    """Holds B samples of one bucket; t, h, w: latent frames and pixels; D: the text encoder's
    width."""

    names: list[str]
    bucket: Bucket
    latents: Tensor  # (B, 16, t, h, w) bf16
    caption_embeds: Tensor  # (B, 512, D) bf16, zero behind a caption's end
    caption_mask: Tensor  # (B, 512) bool
    position: int  # in the run; noise and timesteps depend on it and on the seed alone


class LatentDataset(Dataset[Batch]):
    """Gives micro-batches by position, and by `held_out_sample` the samples kept from training.

    Args:
        max_tokens: captions are padded to so many.
        num_held_out: so many samples are kept from training.

    Raises:
        ValueError: a cache is not there, no sample is in both, or all would be held out.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        batch_size: int,
        seed: int,
        max_tokens: int = MAX_TOKENS,
        num_held_out: int = 0,
    ) -> None:
        self.max_tokens = max_tokens
        self.data = data
        self.process = os.getpid()
        self.latent_cache, self.text_cache = open_caches(data)
        try:
            samples = read_samples(self.latent_cache.storage)
        except ObjectVanishedError:
            raise ValueError(
                f"{self.latent_cache.storage.location}: has no {SAMPLES}. Run "
                "longcat_video_fft.precompute first."
            ) from None
        entries: list[tuple[Entry, Entry]] = []
        for name, size, _, caption in samples:
            latent, text = self.latent_cache.find(name, size), self.text_cache.find(caption)
            if latent is not None and text is not None:
                entries.append((latent, text))
        if not entries:
            raise ValueError(
                f"{data.source}: the caches hold no sample. Run longcat_video_fft.precompute first."
            )
        longest = max(text.shape[0] for _, text in entries)
        if longest > max_tokens:
            raise ValueError(
                f"{self.text_cache.storage.location}: a caption has {longest} tokens, and "
                f"max_text_tokens={max_tokens}. Set it to {longest} or more (512 is the model's)."
            )
        is_held_out = split_held_out([latent.id for latent, _ in entries], num_held_out)
        self.entries = [e for e, out in zip(entries, is_held_out, strict=True) if not out]
        held_out = [e for e, out in zip(entries, is_held_out, strict=True) if out]
        # By bucket, so that devices that share them out have the same shapes at a time.
        self.held_out = sorted(held_out, key=lambda e: (parse_bucket(e[0].bucket), e[0].id))
        self.order = TrainingOrder(
            [latent.id for latent, _ in self.entries],
            [parse_bucket(latent.bucket) for latent, _ in self.entries],
            batch_size=batch_size,
            seed=seed,
            repeats=data.videos.repeats,
        )

    def __getitem__(self, position: int) -> Batch:
        if self.process != os.getpid():
            self._reopen()
        micro_batch = self.order.micro_batch(position)
        return self._read([self.entries[i] for i in micro_batch.samples], position)

    def held_out_sample(self, index: int) -> Batch:
        """Returns number `index` of the held-out samples, a batch of one; it has no position."""
        return self._read([self.held_out[index]], position=-1)

    def _read(self, pairs: list[tuple[Entry, Entry]], position: int) -> Batch:
        embeds, mask = self.pad([self.text_cache.read(text) for _, text in pairs])
        return Batch(
            names=[latent.id for latent, _ in pairs],
            bucket=parse_bucket(pairs[0][0].bucket),
            latents=torch.stack([self.latent_cache.read(latent) for latent, _ in pairs]),
            caption_embeds=embeds,
            caption_mask=mask,
            position=position,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy in a spawned loader's worker: its storages came with clients of its
        own."""
        self.__dict__.update(state)
        self.process = os.getpid()

    def _reopen(self) -> None:
        """Opens clients of its own in a forked loader's worker, in place of its parent's."""
        self.latent_cache.storage = open_cache_storage(self.data, self.data.videos.cache_dir_vae)
        self.text_cache.storage = open_cache_storage(self.data, self.data.text.cache_dir)
        self.process = os.getpid()

    def empty_caption(self) -> tuple[Tensor, Tensor]:
        """Returns ((1, 512, D), (1, 512)) of the empty caption, for guidance dropout."""
        entry = self.text_cache.find(EMPTY_CAPTION)
        if entry is None:
            raise ValueError(f"{self.text_cache.storage.location}: no empty caption; precompute.")
        return self.pad([self.text_cache.read(entry)])

    def pad(self, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Pads (L, D) each -> (B, 512, D), (B, 512): lossless, see model/text_encoder.py."""
        padded = embeddings[0].new_zeros(len(embeddings), self.max_tokens, embeddings[0].shape[1])
        mask = torch.zeros(len(embeddings), self.max_tokens, dtype=torch.bool)
        for row, embedding in enumerate(embeddings):
            padded[row, : len(embedding)] = embedding
            mask[row, : len(embedding)] = True
        return padded, mask
