"""Turns a prepared sample into what the model takes: streams with labels, patches, features.

Follows prepare.py; collator.py puts several together. What the conversation says is the business
of `preprocess_function` in train_ds.py, which a user may edit.

Shapes: T positions, S audio streams, P patches, F audio tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset
from tqdm import tqdm

from vss_longcat_omni.dataset.conversation import MediaItem
from vss_longcat_omni.dataset.folders import read_transcript
from vss_longcat_omni.dataset.interleave import plan_interleaved
from vss_longcat_omni.dataset.template import build_labels, build_streams
from vss_longcat_omni.media.pixels import num_tokens as num_unit_tokens
from vss_longcat_omni.media.pixels import plan_pooling, to_patches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from vss_longcat_omni.dataset.conversation import Turn
    from vss_longcat_omni.dataset.prepare import PreparedSample
    from vss_longcat_omni.dataset.special_tokens import SpecialTokens
    from vss_longcat_omni.dataset.template import Streams
    from vss_longcat_omni.media.frame_sampling import Strategy
    from vss_longcat_omni.media.pixels import Grid, PixelConfig, PooledGrid


logger = logging.getLogger(__name__)

TRANSCRIBE = "python -m vss_longcat_omni.tools.transcribe"


@dataclass(frozen=True)
class Example:
    """Holds one sample."""

    input_ids: Tensor  # (T,)
    audio_ids: Tensor  # (T, S)
    text_labels: Tensor  # (T,), at the position that they describe
    audio_labels: Tensor  # (T, S)
    pixel_values: Tensor  # (P, patch size)
    grids: list[Grid]
    pooled_grids: list[PooledGrid]
    features: Tensor  # (F, feature size)


class VssDataset(Dataset[Example]):
    """Makes an `Example` of each prepared sample.

    Args:
        prepared: the samples.
        build_conversation: returns the conversation of a sample, given its folder, its media, its
            transcript (None where none is wanted) and its answer's codes.
        use_transcripts: every sample needs one.

    Raises:
        ValueError: a transcript is missing, or longer than its answer, by the sample's name.
    """

    def __init__(
        self,
        prepared: Sequence[PreparedSample],
        build_conversation: Callable[[Path, MediaItem, str | None, Tensor], list[Turn]],
        tokenizer: Any,
        *,
        tokens: SpecialTokens,
        pixels: PixelConfig,
        use_transcripts: bool,
        show_progress: bool = False,
    ) -> None:
        self.prepared, self.build_conversation = prepared, build_conversation
        self.tokenizer, self.tokens, self.pixels = tokenizer, tokens, pixels
        self.use_transcripts = use_transcripts
        if use_transcripts and (num_cached := sum(p.has_cached_transcript for p in prepared)):
            logger.info("%d of %d transcripts are from the cache", num_cached, len(prepared))
        each = tqdm(prepared, desc="reading samples", disable=not show_progress)
        self.lengths = [len(self.build_streams(sample).input_ids) for sample in each]

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> Example:
        sample = self.prepared[index]
        streams = self.build_streams(sample)
        text_labels, audio_labels = build_labels(streams, tokens=self.tokens)
        pixel_values, grids = to_patches(sample.load_frames(), self.pixels)
        features = sample.load_features()
        if not (streams.input_ids == self.tokens.image_pad).any():  # the conversation shows nothing
            pixel_values, grids = pixel_values[:0], []
        if not (streams.input_ids == self.tokens.audio_pad).any():
            features = features[:0]
        return Example(
            input_ids=streams.input_ids,
            audio_ids=streams.audio_ids,
            text_labels=text_labels,
            audio_labels=audio_labels,
            pixel_values=pixel_values,
            grids=grids,
            pooled_grids=pool(grids, self.pixels) if grids else [],
            features=features,
        )

    def build_streams(self, sample: PreparedSample) -> Streams:
        name = sample.sample.name
        try:
            media = plan_media(
                sample.frame_shape,
                sample.timestamps,
                sample.strategy,
                sample.num_audio_tokens,
                pixels=self.pixels,
            )
            folder = sample.sample.video.parent
            turns = self.build_conversation(folder, media, self._transcript(sample), sample.codes)
            streams = build_streams(turns, self.tokenizer, tokens=self.tokens)
            self._check_media(streams, media)
            return streams
        except ValueError as error:
            raise ValueError(f"sample {name}: {error}") from error

    def _check_media(self, streams: Streams, media: MediaItem) -> None:
        """Check that the conversation has all of the video or nothing of it; its sound alike."""
        pads = {"image_tokens": self.tokens.image_pad, "audio_pads": self.tokens.audio_pad}
        for kind, pad in pads.items():
            wanted = sum(part.count for part in media.parts if part.kind == kind)
            found = int((streams.input_ids == pad).sum())
            if found not in (0, wanted):
                raise ValueError(
                    f"the conversation of preprocess_function has {found} {kind}, the sample "
                    f"{wanted}: use the media item once, or not at all."
                )

    def _transcript(self, sample: PreparedSample) -> str | None:
        path = sample.sample.transcript
        if path is not None and self.use_transcripts:
            return read_transcript(path)
        if self.use_transcripts:
            wanted = sample.sample.output_audio.with_suffix(".txt").name
            raise ValueError(
                f"no {wanted} beside {sample.sample.output_audio.name}. Write what the answer "
                f"says, or let a recognizer transcribe all of them (`{TRANSCRIBE} "
                f"{sample.sample.video.parent.parent} --cache_dir {sample.path.parent} --asr "
                "whisper:FOLDER_OR_HUB_ID`), or train without text by --transcripts none."
            )
        return None


def plan_media(
    frame_shape: tuple[int, ...],
    timestamps: Sequence[str],
    strategy: Strategy,
    num_audio_tokens: int,
    *,
    pixels: PixelConfig,
) -> MediaItem:
    """Plan the tokens of a video (frames, height, width, 3) and its sound, in their order."""
    frames, height, width, _ = frame_shape
    grid = (1, height // pixels.patch_size, width // pixels.patch_size)
    pooled = pool([grid] * max(1, frames // 2), pixels)
    image_tokens = [num_unit_tokens((1, h, w)) for h, w in pooled]
    return MediaItem(
        plan_interleaved(timestamps, image_tokens, num_audio_tokens, strategy=strategy)
    )


def pool(grids: list[Grid], pixels: PixelConfig) -> list[PooledGrid]:
    """Return the pooled grids of one video, which is all that a sample shows."""
    return plan_pooling([grids], pixels)[1][0]
