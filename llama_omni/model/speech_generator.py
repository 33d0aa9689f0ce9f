"""Decodes states of the language model into discrete speech units; trained by CTC.

Follows omni_speech/model/speech_generator/speech_generator.py of ictnlp/LLaMA-Omni and the paper's
section 2.4 (arXiv 2409.06666): each state that predicts a token of the answer is repeated
`ctc_upsample_factor` times, run through a few causal Llama layers, and classified into
`unit_vocab_size` units and the blank, which comes last.

Shapes: B answers, T positions, M states of the longest answer, H width of the language model,
N = frames of the longest answer after repeating, W width of the decoder, V units, U target units.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llama_omni.dataset.batch import IGNORE_INDEX
from llama_omni.model.loss import ctc_sum
from llama_omni.options.config import parse_decoder_shape


def build_decoder_config(config: Any) -> LlamaConfig:
    """Builds the config of the decoder's layers; position encoding is the language model's."""
    layers, width, heads, ffn = parse_decoder_shape(config.ctc_decoder_config)
    rope = getattr(config, "rope_parameters", None) or {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
    }
    decoder_config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        intermediate_size=ffn,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(rope),
        max_position_embeddings=getattr(config, "max_position_embeddings", 131072),
    )
    decoder_config._attn_implementation = "sdpa"
    return decoder_config


def select_states(hidden_states: Tensor, labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Moves each answer's states to the front.

    Args:
        hidden_states: (B, T, H).
        labels: (B, T), IGNORE_INDEX outside the answers.
        shift: take the state that predicts each label, one position earlier, as inference does;
            False takes the state at the label, as the released training code did.

    Returns:
        (B, M, H) states, zero beyond each answer's own, and their numbers (B,).
    """
    is_answer = labels != IGNORE_INDEX
    if shift:
        is_answer = F.pad(is_answer[:, 1:], (0, 1))
    counts = is_answer.sum(1)
    longest = max(int(counts.max()), 1)
    states = hidden_states.new_zeros(len(labels), longest, hidden_states.shape[-1])
    in_answer = torch.arange(states.shape[1], device=labels.device) < counts[:, None]
    states[in_answer] = hidden_states[is_answer]
    return states, counts


def upsample_index(num_states: Tensor, num_frames: Tensor) -> Tensor:
    """Returns which state each frame repeats: (B,), (B,) -> (B, N).

    Dividing twice in float32, as the official code does, decides ties at the edges of a state.
    """
    frames = torch.arange(max(int(num_frames.max()), 1), device=num_states.device)
    ratio = num_frames / num_states.clamp(min=1)
    index = (frames / ratio.clamp(min=1e-6)[:, None]).long()
    return torch.minimum(index, (num_states - 1).clamp(min=0)[:, None])


def collapse_path(path: list[int], *, blank: int, previous: int = -1) -> list[int]:
    """Merges repeats, then drops blanks; `previous` is the frame before the path, if any."""
    units = []
    for unit in path:
        if unit not in (previous, blank):
            units.append(unit)
        previous = unit
    return units


class DecoderLayer(LlamaDecoderLayer):
    """Llama's layer; it picks the kernel itself, so that recomputation picks the same one."""

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        with _attention_kernels(hidden_states):
            return super().forward(hidden_states, **options)


class SpeechGeneratorCTC(nn.Module):
    """`config` needs hidden_size, ctc_decoder_config, ctc_upsample_factor, unit_vocab_size,
    rms_norm_eps and rope_parameters (or rope_theta)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.decoder_config = build_decoder_config(config)
        self.upsample_factor: int = config.ctc_upsample_factor
        self.unit_vocab_size: int = config.unit_vocab_size
        width = self.decoder_config.hidden_size
        self.input_proj = nn.Linear(config.hidden_size, width)
        self.layers = nn.ModuleList(
            [
                DecoderLayer(self.decoder_config, i)
                for i in range(self.decoder_config.num_hidden_layers)
            ]
        )
        self.output_proj = nn.Linear(width, config.unit_vocab_size + 1)
        self.rotary_emb = LlamaRotaryEmbedding(self.decoder_config)  # no weights, not saved

    @property
    def blank(self) -> int:
        return self.unit_vocab_size

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        tgt_units: Tensor,
        shift: bool = True,
        num_units: Tensor | int | None = None,
    ) -> Tensor:
        """Returns the CTC loss in nats a unit.

        Args:
            hidden_states: (B, T, H) after the language model's last norm.
            labels: (B, T), IGNORE_INDEX outside the answers.
            tgt_units: (B, U), padded with IGNORE_INDEX.
            shift: see `select_states`.
            num_units: what to divide the sum by; the global batch's units in training, this
                batch's own when None.

        Answers with more units than frames are stretched to as many frames. One that has no path
        even so (repeated neighbors) adds 0: `count_infeasible` counts them.
        """
        logits, num_frames, unit_lengths = self.frame_logits(
            hidden_states, labels, tgt_units, shift=shift
        )
        if num_units is None:
            num_units = unit_lengths.sum().clamp(min=1)
        return ctc_sum(logits, num_frames, tgt_units, unit_lengths, blank=self.blank) / num_units

    def frame_logits(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        tgt_units: Tensor,
        *,
        shift: bool,
        stretch: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (B, N, V + 1) logits, (B,) frames and (B,) target units of each answer.

        Without `stretch`, answers with more units than frames have no path and add 0 to the loss.
        """
        states, num_states = select_states(hidden_states, labels, shift=shift)
        unit_lengths = (tgt_units != IGNORE_INDEX).sum(1)
        num_frames = num_states * self.upsample_factor
        if stretch:
            num_frames = torch.maximum(num_frames, unit_lengths)
        return self.decode(states, num_states, num_frames), num_frames, unit_lengths

    def decode(
        self,
        states: Tensor,
        num_states: Tensor,
        num_frames: Tensor,
        *,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Decodes (B, M, H) to (B, N, V + 1); with a cache, frames follow those decoded before."""
        x = self.input_proj(states)  # once a state, before it is repeated: the same, 25 times less
        index = upsample_index(num_states, num_frames)
        x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))  # (B, N, W)
        start = cache.get_seq_length() if cache is not None else 0
        position_ids = torch.arange(start, start + x.shape[1], device=x.device)[None]
        rotary = self.rotary_emb(x, position_ids)
        # No mask is needed on padded frames: they come last, and attention is causal.
        mask = _chunk_mask(x.shape[1], start, x.device) if start else None
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
        return self.output_proj(x)

    @torch.no_grad()
    def predict(self, states: Tensor) -> Tensor:
        """Returns the arg-max path (1, 25 M) over units and blank, of an answer's states (M, H)."""
        num_states = torch.tensor([len(states)], device=states.device)
        logits = self.decode(states[None], num_states, num_states * self.upsample_factor)
        return logits.float().argmax(-1)


def _attention_kernels(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Picks, in float32 on a CPU, the plain kernel that official gradients were computed with."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def _chunk_mask(length: int, start: int, device: torch.device) -> Tensor:
    """Returns (1, 1, length, start + length), causal, of a chunk that follows `start` frames."""
    queries = torch.arange(start, start + length, device=device)[:, None]
    return (torch.arange(start + length, device=device) <= queries)[None, None]
