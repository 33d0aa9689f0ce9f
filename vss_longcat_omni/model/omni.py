"""The whole model: two encoders -> one stream of embeddings -> language model -> text and codes.

Samples lie one after the other (T positions in all), each seeing itself alone. The attributes stand
where the language model of transformers has them, so that adapters fit both.

Shapes: T packed positions, S audio streams, H hidden size, P patches, B clips, F audio tokens of
the longest clip, N text targets, M positions with audio targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from vss_longcat_omni.dataset.special_tokens import IGNORE_INDEX, SpecialTokens
from vss_longcat_omni.model.audio_encoder import AudioEncoder, AudioEncoderConfig, AudioProjector
from vss_longcat_omni.model.fusion import AudioEmbeddings, merge_embeddings
from vss_longcat_omni.model.language_model import LongcatFlashModel
from vss_longcat_omni.model.loss import combine, compute_loss_sums
from vss_longcat_omni.model.speech_heads import AudioOutputLayers
from vss_longcat_omni.model.vision_encoder import (
    VisionConfig,
    VisionEncoder,
    VisionProjector,
    pool_features,
)
from vss_longcat_omni.options.run_arguments import LossWeights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.model.config import LongcatOmniConfig


class Pictures(TypedDict):
    """Holds the units (pairs of frames) of all samples."""

    pixel_values: Tensor  # (P, patch size)
    grids: Sequence[tuple[int, int, int]]
    pooled_grids: Sequence[tuple[int, int]]


class Sound(TypedDict):
    features: Tensor  # (B, F, feature size)
    lengths: Tensor  # (B,)
    num_tokens: int  # their sum


@dataclass
class OmniOutput(ModelOutput):
    """Holds a training step's `loss` and (3,) sums of text, audio, semantic; else `logits`."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (T, vocab_size), or (rows, columns, vocab_size)
    losses: Tensor | None = None
    counts: Tensor | None = None
    num_correct: Tensor | None = None


class LongcatOmniForCausalLM(nn.Module):
    """Has no vision encoder without `vision_config`, no audio encoder without `audio_config`."""

    def __init__(
        self,
        config: LongcatOmniConfig,
        loss_weights: LossWeights | None = None,
        tokens: SpecialTokens | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokens = tokens or SpecialTokens()
        self.loss_weights = loss_weights or LossWeights()
        self.model = LongcatFlashModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.audio_embedding = AudioEmbeddings(
            config.audio_vocab_size, config.hidden_size, num_streams=config.audio_head_num
        )
        self.speech_heads = AudioOutputLayers(config)
        if config.vision_config is not None:
            vision = VisionConfig.from_dict(
                config.vision_config | {"proj_output_dim": config.hidden_size},
                source="vision/config.json",
            )
            self.vision_encoder = VisionEncoder(vision)
            self.vision_projector = VisionProjector(vision)
        if config.audio_config is not None:
            audio = AudioEncoderConfig.from_dict(config.audio_config)
            self.audio_encoder = AudioEncoder(audio)
            self.audio_projector = AudioProjector(audio.output_size, config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep the inputs of every n-th layer in place of what is in it; Trainer calls it.

        Raises:
            ValueError: an argument that is not honored. Checkpoints are non-reentrant: reentrant
                ones need an input with a gradient, which a frozen embedding does not give.
        """
        if offload or (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("gradient_checkpointing_kwargs: take out offload and use_reentrant.")
        self.model.checkpoint_every = every_n_layers
        if self.config.vision_config is not None:
            self.vision_encoder.gradient_checkpointing_enable()

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Do so under the name before transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def encode_pictures(self, pictures: Pictures) -> Tensor:
        """Return (image pads, H); a frozen encoder keeps nothing for the backward."""
        grids, pixel_values = pictures["grids"], pictures["pixel_values"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(self.vision_encoder)):
            features = self.vision_encoder(pixel_values.to(self.dtype), grids)
        return pool_features(
            self.vision_projector(features, grids), grids, pictures["pooled_grids"]
        )

    def encode_sound(self, sound: Sound) -> Tensor:
        """Return (audio pads, H), clip after clip."""
        features, lengths = sound["features"].to(self.dtype), sound["lengths"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(self.audio_encoder)):
            states = self.audio_encoder(features, lengths, num_tokens=sound["num_tokens"])
        return self.audio_projector(states)

    def embed(
        self,
        input_ids: Tensor,
        audio_ids: Tensor,
        pictures: Pictures | None = None,
        sound: Sound | None = None,
    ) -> Tensor:
        """Embed (T,), (T, S) and the media to (T, H).

        Both encoders run in every process, on next to nothing where its samples show or sound
        nothing, and count zero times in the result: under ZeRO-3 all processes gather a module's
        weights together, forward and backward, and would wait for one that does not.
        """
        image_features, sound_features, unused = None, None, []
        if self.config.vision_config is not None:
            features = self.encode_pictures(pictures or self._no_pictures(input_ids.device))
            image_features = features if pictures else unused.append(features)
        if self.config.audio_config is not None:
            features = self.encode_sound(sound or self._no_sound(input_ids.device))
            sound_features = features if sound else unused.append(features)
        merged = merge_embeddings(
            self.model.embed_tokens(input_ids)[None],
            self.audio_embedding(audio_ids[None]),
            input_ids[None],
            audio_ids[None],
            tokens=self.tokens,
            audio_features=sound_features,
            image_features=image_features,
        )[0]
        return merged + sum(0.0 * features.sum() for features in unused)

    def _no_pictures(self, device: torch.device) -> Pictures:
        """Return one token's worth of black."""
        size = self.vision_encoder.config.patch_dim
        pixel_values = torch.zeros(2, size, device=device)
        return {"pixel_values": pixel_values, "grids": [(1, 1, 2)], "pooled_grids": [(1, 2)]}

    def _no_sound(self, device: torch.device) -> Sound:
        """Return one token's worth of silence."""
        features = torch.zeros(1, 1, self.audio_encoder.config.input_size, device=device)
        lengths = torch.ones(1, dtype=torch.long, device=device)
        return {"features": features, "lengths": lengths, "num_tokens": 1}

    def forward(
        self,
        input_ids: Tensor,
        audio_ids: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        *,
        text_positions: Tensor | None = None,
        text_targets: Tensor | None = None,
        audio_positions: Tensor | None = None,
        audio_targets: Tensor | None = None,
        num_targets: Tensor | None = None,
        pictures: Pictures | None = None,
        sound: Sound | None = None,
    ) -> OmniOutput:
        """Return the loss of packed samples; without targets the text logits.

        Args:
            input_ids: (T,), or rows of text (rows, columns), each a sequence.
            audio_ids: (T, S); without it no position has a code.
            lengths: of the samples that lie one after the other.
            text_positions, text_targets: (N,) what the position is to predict.
            audio_positions, audio_targets: (M,), (M, S); IGNORE_INDEX where there is no target.
            num_targets: (3,) that the sums are divided by; without it those of this call.
            pictures, sound: what takes the places of image and audio pads.
        """
        shape = input_ids.shape
        if input_ids.ndim == 2:
            lengths = [shape[1]] * shape[0]
            input_ids = input_ids.flatten()
        lengths = lengths or [len(input_ids)]
        if audio_ids is None:
            no_code = self.tokens.codec.pad
            audio_ids = input_ids.new_full((len(input_ids), self.config.audio_head_num), no_code)
        position_ids = torch.cat([torch.arange(n, device=input_ids.device) for n in lengths])
        hidden = self.model(
            self.embed(input_ids, audio_ids, pictures, sound), position_ids, lengths
        )
        if text_targets is None or audio_targets is None:
            return OmniOutput(logits=self.lm_head(hidden).view(*shape, -1))
        # Teacher forcing: where a stream has no target, the next head gets its PAD.
        forced = audio_targets.where(audio_targets != IGNORE_INDEX, self.tokens.codec.pad)
        audio_logits = self.speech_heads(hidden[audio_positions], forced)
        text_logits = self.lm_head(hidden[text_positions])
        sums = compute_loss_sums(text_logits, text_targets, audio_logits, audio_targets)
        loss = combine(sums, sums.counts if num_targets is None else num_targets, self.loss_weights)
        return OmniOutput(
            loss=loss,
            losses=sums.losses.detach(),
            counts=sums.counts,
            num_correct=sums.num_correct,
        )


def is_trained(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters())
