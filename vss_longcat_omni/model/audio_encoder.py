"""Encodes features of the sound to one embedding of the language model's width every 80 ms.

Follows media/fbank.py in the data flow; the embeddings stand in for the audio pads (model/omni.py).
It is a streaming DFSMN: no attention, each layer remembers through a depthwise convolution over
past positions, and one to come in the last layers. Parameter names, order of operations and
defaults follow encoders/audio_adaptor.py of meituan-longcat/LongCat-Flash-Omni, so that
audio_encoder.pt and audio_projector.pt load as they are; tests compare it with outputs and
gradients of the official code.

B clips, T positions of the longest, N positions that are sound, P proj_size, H hidden_size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

ACTIVATIONS = {"relu6": 6.0, "relu2": 2.0, "relu": torch.inf}  # where they stop rising


@dataclass(frozen=True, kw_only=True)
class AudioEncoderConfig:
    """Has the keys of the released audio/config.json with its class's own defaults.

    Raises ValueError for a value that cannot work.
    """

    input_size: int = 1200
    hidden_size: int = 6144
    proj_size: int = 1536
    vocab_size: int = 5252
    nlayer: int = 22
    ndnn: int = 2
    num_right_layers: int = 6
    left_order: int = 10
    right_order: int = 1
    left_stride: int = 1
    right_stride: int = 1  # read by nothing: left_stride counts for both sides, as officially
    activation: str = "relu6"
    dropout: float = 0.1
    layer_drop: float = 0.0

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "proj_size", "vocab_size", "left_stride"):
            self._require_count(name, least=1)
        for name in ("nlayer", "ndnn", "num_right_layers", "left_order", "right_order"):
            self._require_count(name, least=0)
        # The official code takes any other name as relu.
        known = ", ".join(ACTIVATIONS)
        self._require("activation", self.activation in ACTIVATIONS, f"must be one of {known}")
        self._require("dropout", 0 <= self.dropout < 1, "must be in 0..1")
        self._require("layer_drop", self.layer_drop == 0, "is not supported, nor officially: 0")

    def _require_count(self, name: str, *, least: int) -> None:
        value = getattr(self, name)
        is_good = isinstance(value, int) and value >= least
        self._require(name, is_good, f"must be a whole number of {least} or more")

    def _require(self, name: str, is_good: bool, message: str) -> None:
        if not is_good:
            raise ValueError(f"audio/config.json: {name}={getattr(self, name)!r} {message}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AudioEncoderConfig:
        """Read the encoder's own keys; others (transformers writes some) are left alone."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    @property
    def output_size(self) -> int:
        """Return the width of the encoder's output."""
        return self.hidden_size if self.ndnn else self.proj_size


class AudioEncoderLayer(nn.Module):
    """Adds a memory over past (and coming) positions, then a feed-forward part, to the input."""

    def __init__(self, config: AudioEncoderConfig, *, right_order: int) -> None:
        super().__init__()
        width, dilation = config.proj_size, config.left_stride
        self.context = (config.left_order * dilation, right_order * dilation)
        self.memory_ln = nn.LayerNorm(width)
        self.memory = nn.Conv1d(
            width,
            width,
            config.left_order + right_order + 1,
            dilation=dilation,
            groups=width,
            bias=False,
        )
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.hidden_size),
            build_activation(config),
            nn.Linear(config.hidden_size, width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Encode (B, T, P) to (B, T, P); `mask` (B, T, 1) zeroes what the memory convolves."""
        normed = self.memory_ln(x)
        if mask is not None:
            normed = normed * mask
        memory = self.memory(F.pad(normed.transpose(1, 2), self.context))  # (B, P, T)
        x = x + self.dropout(memory.transpose(1, 2))
        return x + self.ffn(x)


class AudioEncoder(nn.Module):
    """The streaming encoder; `remask=False` is the official behavior in a padded batch.

    The official code zeroes positions beyond a clip's end before each layer's norm; the norm turns
    these zeroes into its bias, and the convolution gets that where a clip alone has the
    convolution's own zeroes. So the last num_right_layers * right_order positions of a clip depend
    on whether a longer clip is beside it. By default they are zeroed after the norm instead: a clip
    then has the same result in every batch, the official one of the clip alone.
    """

    def __init__(self, config: AudioEncoderConfig, *, remask: bool = True) -> None:
        super().__init__()
        self.config, self.remask = config, remask
        self.ffn = nn.Sequential(
            nn.Linear(config.input_size, config.hidden_size),
            build_activation(config),
            nn.Linear(config.hidden_size, config.proj_size, bias=False),
        )
        first_right = config.nlayer - config.num_right_layers
        self.fsmn_layers = nn.ModuleList(
            AudioEncoderLayer(config, right_order=config.right_order if i >= first_right else 0)
            for i in range(config.nlayer)
        )
        self.dnn = nn.Sequential()
        for i in range(config.ndnn):
            width = config.hidden_size if i else config.proj_size
            self.dnn.append(nn.Linear(width, config.hidden_size))
            self.dnn.append(build_activation(config))
        self.output = nn.Linear(config.output_size, config.vocab_size)

    def train(self, mode: bool = True) -> AudioEncoder:
        """Keep a frozen encoder in evaluation mode: no dropout, whatever calls train()."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(
        self, features: Tensor, lengths: Tensor, *, num_tokens: int | None = None
    ) -> Tensor:
        """Return (N, H): the positions that are sound, clip after clip.

        Args:
            features: (B, T, input_size), any finite values beyond a clip's end.
            lengths: (B,) int64 on the same device, each at most T.
            num_tokens: N, the sum of `lengths`. Without it the host waits for the device.

        Raises ValueError for features of another width.
        """
        if features.ndim != 3 or features.shape[2] != self.config.input_size:
            raise ValueError(
                f"features of shape {tuple(features.shape)}: the audio encoder takes (clips, "
                f"positions, input_size={self.config.input_size}); {self.config.input_size} must "
                "be what audio/preprocessor_config.json makes"
            )
        positions = torch.arange(features.shape[1], device=features.device)
        mask = (positions < lengths[:, None])[..., None]  # (B, T, 1)
        x = self.ffn(features.to(self.output.weight.dtype))
        for layer in self.fsmn_layers:
            x = layer(x, mask) if self.remask else layer(x * mask, None)
        if num_tokens is None:
            num_tokens = int(lengths.sum())
        index = valid_index(lengths, num_tokens, max_length=features.shape[1])
        x = x.flatten(0, 1).index_select(0, index)
        return self._keep_head(self.dnn(x))

    def logits(self, x: Tensor) -> Tensor:
        """Map (N, H) of `forward` to (N, vocab_size) by the head that a CTC loss once trained."""
        return self.output(x)

    def _keep_head(self, x: Tensor) -> Tensor:
        """Add zero times the head, so that a trainable head has gradients, which are zero.

        Data-parallel training waits for those of every trainable parameter. The official code
        always adds it and over all positions; one is enough, and a frozen head needs none.
        """
        if torch.is_grad_enabled() and self.output.weight.requires_grad:
            return x + 0.0 * self.output(x[:1]).sum()
        return x


class AudioProjector(nn.Sequential):
    """Maps (N, output_size) of the encoder to (N, hidden size of the language model)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(
            nn.Linear(input_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )


def build_activation(config: AudioEncoderConfig) -> nn.Module:
    return nn.Hardtanh(0.0, ACTIVATIONS[config.activation])


def valid_index(lengths: Tensor, num_tokens: int, *, max_length: int) -> Tensor:
    """Return (num_tokens,) places of the sounding positions in the flattened (B, max_length)."""
    clips = torch.repeat_interleave(lengths, output_size=num_tokens)  # of each token
    starts = lengths.cumsum(0) - lengths
    order = torch.arange(num_tokens, device=lengths.device)
    return clips * max_length + order - starts[clips]
