"""Builds the whole model: speech encoder -> projector -> Llama -> (text | speech generator).

`OmniSpeech2SLlamaForCausalLM` is transformers' Llama with the speech modules hung where the
official code has them, so parameter names equal those of released checkpoints. Its `forward` gives
a training loss; `generate.py` uses the parts.

Shapes: B sequences, T tokens (speech placeholders included), S clips, F mel frames, H width,
V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_omni.dataset.batch import IGNORE_INDEX, SPEECH_TOKEN_INDEX, Batch
from llama_omni.model.loss import LossSums, sum_text_loss, sum_unit_loss
from llama_omni.model.speech_encoder import WhisperEncoder, num_encoder_states
from llama_omni.model.speech_generator import SpeechGeneratorCTC
from llama_omni.model.speech_projector import EncoderProjectorConcat

if TYPE_CHECKING:
    from llama_omni.options.config import TrainConfig


class OmniSpeech2SConfig(LlamaConfig):
    """Adds the official speech keys and the encoder's sizes to Llama's config."""

    model_type = "omni_speech2s_llama"


class OmniSpeech2SLlamaForCausalLM(LlamaForCausalLM):
    """Adds the speech modules to Llama; the generator exists when `speech_generator_type` does."""

    config_class = OmniSpeech2SConfig  # pyright: ignore[reportAssignmentType]

    def __init__(self, config: OmniSpeech2SConfig) -> None:
        super().__init__(config)
        self.model.speech_encoder = WhisperEncoder(
            mel_size=config.mel_size,
            width=config.speech_encoder_hidden_size,
            num_layers=config.speech_encoder_layers,
        )
        self.model.speech_projector = EncoderProjectorConcat(config)
        if getattr(config, "speech_generator_type", None):
            self.speech_generator = SpeechGeneratorCTC(config)

    def reset_rotary(self, device: torch.device) -> None:
        """Recomputes the position tables, which `to_empty` leaves undefined."""
        self.model.rotary_emb = LlamaRotaryEmbedding(self.config).to(device)  # pyright: ignore
        generator = getattr(self, "speech_generator", None)
        if generator is not None:
            generator.rotary_emb = LlamaRotaryEmbedding(generator.decoder_config).to(device)

    def encode_speech(self, speech: Tensor, speech_lengths: Tensor) -> Tensor:
        """Encodes (S, M, F) mel of (S,) frames as (N, H): valid projected states, clip by clip."""
        encoder: Any = self.model.speech_encoder
        states = encoder(speech.to(encoder.conv1.weight.dtype), speech_lengths)
        projector: Any = self.model.speech_projector
        projected = projector(states.to(projector.linear1.weight.dtype))
        lengths = num_encoder_states(speech_lengths) // projector.k
        is_valid = torch.arange(projected.shape[1], device=speech.device) < lengths[:, None]
        return projected[is_valid]

    def embed(self, input_ids: Tensor, speech: Tensor, speech_lengths: Tensor) -> Tensor:
        """Embeds (B, T) ids with SPEECH_TOKEN_INDEX placeholders as (B, T, H)."""
        is_speech = input_ids == SPEECH_TOKEN_INDEX
        embeds = self.model.embed_tokens(input_ids.masked_fill(is_speech, 0))
        features = self.encode_speech(speech, speech_lengths).to(embeds.dtype)
        return embeds.masked_scatter(is_speech[..., None], features)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Returns (B, T, H) after the last norm."""
        embeds = self.embed(batch.input_ids, batch.speech, batch.speech_lengths)
        # Padding comes last: causal attention needs no mask.
        return self.model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def forward(self, batch: Batch, task: str) -> LossSums:  # pyright: ignore
        """Returns the loss of `task`: "text" is cross-entropy (stage 1), "units" CTC (stage 2)."""
        if task == "text":
            return self.text_loss(self.hidden_states(batch), batch.labels)
        with torch.no_grad():
            hidden_states = self.hidden_states(batch)
        assert batch.tgt_units is not None
        return self.unit_loss(hidden_states, batch.labels, batch.tgt_units)

    def text_loss(self, hidden_states: Tensor, labels: Tensor) -> LossSums:
        """Sums cross-entropy over the answers' tokens; the head runs on those positions alone."""
        predicts = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
        logits = self.lm_head(hidden_states[predicts]).float()  # (N, V)
        targets = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
        return sum_text_loss(logits, targets)

    def unit_loss(self, hidden_states: Tensor, labels: Tensor, tgt_units: Tensor) -> LossSums:
        """Sums CTC over the answers' units."""
        generator: Any = self.speech_generator
        logits, num_frames, unit_lengths = generator.frame_logits(
            hidden_states.to(generator.input_proj.weight.dtype),
            labels,
            tgt_units,
            shift=getattr(self.config, "ctc_shift_states", True),
            stretch=getattr(self.config, "ctc_infeasible", "stretch") == "stretch",
        )
        return sum_unit_loss(logits, num_frames, tgt_units, unit_lengths, blank=generator.blank)


def build_model_config(
    base: LlamaConfig, encoder_shape: dict[str, int], config: TrainConfig
) -> OmniSpeech2SConfig:
    """Builds a run's config with the keys of the released one (ICTNLP/Llama-3.1-8B-Omni).

    Args:
        base: the config of a plain Llama, or of an earlier stage.
        encoder_shape: mel_size, speech_encoder_hidden_size and speech_encoder_layers.
        config: the run's options.
    """
    values = base.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "tie_word_embeddings"):
        values.pop(key, None)
    values |= encoder_shape
    values |= {
        "architectures": ["OmniSpeech2SLlamaForCausalLM"],
        "tie_word_embeddings": False,
        "speech_encoder_type": config.speech_encoder_type,
        "speech_encoder_ds_rate": config.speech_encoder_ds_rate,
        "speech_projector_type": config.speech_projector_type,
        "speech_normalize": config.speech_normalize,
        "tokenizer_model_max_length": config.model_max_length,
        "tokenizer_padding_side": "right",
        "pad_audio_to_30s": config.pad_audio_to_30s,
    }
    values.setdefault("speech_encoder", str(config.speech_encoder))
    if config.stage == 2:
        values |= {
            "speech_generator_type": config.speech_generator_type,
            "ctc_decoder_config": config.ctc_decoder_config,
            "ctc_upsample_factor": config.ctc_upsample_factor,
            "ctc_loss_weight": config.ctc_loss_weight,
            "ctc_shift_states": config.ctc_shift_states,
            "ctc_infeasible": config.ctc_infeasible,
            "unit_vocab_size": config.unit_vocab_size,
        }
    return OmniSpeech2SConfig(**values)


# So that AutoConfig and AutoTokenizer read our checkpoints and released ones.
AutoConfig.register(OmniSpeech2SConfig.model_type, OmniSpeech2SConfig, exist_ok=True)
