"""Decodes discrete units to a waveform, whole or streamed: the unit HiFi-GAN of the paper.

`vocoder.py` loads it. Architecture and names of the weights: codehifigan.py, hifigan.py and
VariancePredictor of facebookresearch/fairseq (fairseq/models/text_to_speech).
"""

from __future__ import annotations

import math
import warnings
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SLOPE = 0.1  # of the leaky ReLUs, but the last, which has PyTorch's 0.01
CONFIG_KEYS = (
    *("upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel"),
    *("resblock_kernel_sizes", "resblock_dilation_sizes", "num_embeddings", "embedding_dim"),
    *("model_in_dim", "dur_predictor_params"),
)
UNSUPPORTED_KEYS = ("multispkr", "embedder_params", "f0", "f0_quant_num_bin")


class CodeHiFiGAN(nn.Module):
    """Embeds units, repeats each for its predicted duration, and upsamples to 16 kHz.

    `config` is the released config.json. The state dict has the official names (`dict`,
    `dur_predictor`, `conv_pre`, `ups`, `resblocks`, `conv_post`, with weight_g and weight_v).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        validate_config(config)
        channels = config["upsample_initial_channel"]
        rates, kernels = config["upsample_rates"], config["upsample_kernel_sizes"]
        blocks = [
            (kernel, tuple(dilations))
            for kernel, dilations in zip(
                config["resblock_kernel_sizes"], config["resblock_dilation_sizes"], strict=True
            )
        ]
        self.sample_rate = config.get("sampling_rate", 16_000)
        self.num_units = config["num_embeddings"]
        self.hop = math.prod(rates)  # samples per code frame
        self.reach = compute_reach(rates, kernels, blocks)
        self.dict = nn.Embedding(config["num_embeddings"], config["embedding_dim"])
        self.dur_predictor = DurationPredictor(config["dur_predictor_params"])
        self.conv_pre = _normed(nn.Conv1d(config["model_in_dim"], channels, 7, padding=3))
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()  # those of the first upsampling, then of the second, ...
        for rate, kernel in zip(rates, kernels, strict=True):
            padding = (kernel - rate) // 2
            up = nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=padding)
            self.ups.append(_normed(up))
            channels //= 2
            self.resblocks.extend(ResBlock(channels, *block) for block in blocks)
        self.num_blocks = len(blocks)
        self.conv_post = _normed(nn.Conv1d(channels, 1, 7, padding=3))

    @torch.no_grad()
    def forward(self, units: Sequence[int]) -> Tensor:
        """Decodes deduplicated unit ids to (num_samples,) float32 on the CPU.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        timed = zip(self._validate(units), self.predict_durations(units), strict=True)
        frames = [unit for unit, count in timed for _ in range(count)]
        if not frames:
            return torch.empty(0)
        return self.synthesize(self.dict(self._tensor(frames))[None]).cpu()

    @torch.no_grad()
    def stream(self, chunks: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Yields a piece of waveform for each chunk of units (empty while it waits), then the rest.

        Equal to decoding all at once, but for rounding: a sample is given out when no unit to come
        can change it, and is decoded with all it depends on, `reach` code frames to either side
        (0.4 s with the released config). Those to the left are known; those to the right, and two
        units for the durations, are the delay.
        """
        frames: list[int] = []  # code frames that are still needed
        num_given = 0  # the first of them were given out already, and are context
        for added, is_last in self._repeat(chunks):
            frames += added
            num_ready = len(frames) - (0 if is_last else self.reach)
            if num_ready <= num_given:
                yield torch.empty(0)
                continue
            waveform = self.synthesize(self.dict(self._tensor(frames))[None])
            yield waveform[num_given * self.hop : num_ready * self.hop].cpu()
            num_past = max(0, num_ready - self.reach)
            frames, num_given = frames[num_past:], num_ready - num_past

    def _repeat(self, chunks: Iterable[Sequence[int]]) -> Iterator[tuple[list[int], bool]]:
        """Yields (new frames, whether they are the last): each unit as often as it lasts, as soon
        as that is certain."""
        units: list[int] = []  # those whose duration is open, after those that are context
        num_context, margin = 0, self.dur_predictor.reach
        for chunk in chain(chunks, [None]):
            units += self._validate(() if chunk is None else chunk)
            num_certain = max(num_context, len(units) - (0 if chunk is None else margin))
            timed = list(zip(units, self.predict_durations(units), strict=True))
            frames = [unit for unit, count in timed[num_context:num_certain] for _ in range(count)]
            num_past = max(0, num_certain - margin)
            units, num_context = units[num_past:], num_certain - num_past
            yield frames, chunk is None

    @torch.no_grad()
    def predict_durations(self, units: Sequence[int]) -> list[int]:
        """Returns how many code frames each unit lasts, at least 1."""
        if not units:
            return []
        log_durations = self.dur_predictor(self.dict(self._tensor(units))[None])
        return (log_durations.exp() - 1).round().long().clamp(min=1)[0].tolist()

    def synthesize(self, x: Tensor) -> Tensor:
        """Decodes (1, T, embedding_dim) embedded code frames to (T * hop,) waveform in -1..1."""
        x = self.conv_pre(x.transpose(1, 2))
        for number, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            blocks = self.resblocks[number * self.num_blocks : (number + 1) * self.num_blocks]
            x = torch.stack([block(x) for block in blocks]).mean(0)
        return self.conv_post(F.leaky_relu(x)).tanh()[0, 0]

    def fuse_weight_norm(self) -> None:
        """Computes the normalized weights once for all; only for decoding."""
        for module in self.modules():
            if hasattr(module, "weight_g"):
                nn.utils.remove_weight_norm(module)

    def _validate(self, units: Sequence[int]) -> list[int]:
        for unit in units:
            if not 0 <= unit < self.num_units:
                raise ValueError(f"unit {unit} is outside the voice's 0..{self.num_units - 1}")
        return list(units)

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=self.dict.weight.device)


class ResBlock(nn.Module):
    """Applies dilated and plain convolutions in turn, each pair beside a residual path."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Module:
            padding = (kernel - 1) * dilation // 2
            return _normed(
                nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding)
            )

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            x = x + conv2(F.leaky_relu(conv1(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class DurationPredictor(nn.Module):
    """Maps (1, T, embedding_dim) to (1, T), log(1 + code frames) of each unit.

    It computes in float64: a rounding error that moved a duration over x.5 would part streamed from
    whole decoding by 20 ms.
    """

    reach = 2  # units to either side that a duration depends on: two convolutions of width 3

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        width, hidden = params["encoder_embed_dim"], params["var_pred_hidden_dim"]
        self.conv1 = nn.Sequential(nn.Conv1d(width, hidden, 3, padding=1), nn.ReLU())
        self.ln1 = nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(nn.Conv1d(hidden, hidden, 3, padding=1), nn.ReLU())
        self.ln2 = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln1(self.conv1(x.double().transpose(1, 2)).transpose(1, 2))
        x = self.ln2(self.conv2(x.transpose(1, 2)).transpose(1, 2))
        return self.proj(x).squeeze(2)


def compute_reach(
    rates: Sequence[int], kernels: Sequence[int], blocks: Sequence[tuple[int, tuple[int, ...]]]
) -> int:
    """Returns how many code frames to either side of its own a sample depends on.

    It follows the samples of one code frame, `first` to `last`, backwards through the network.
    """
    first, last = -3, math.prod(rates) - 1 + 3  # conv_post, of width 7
    block_reach = max(
        sum((kernel - 1) // 2 * (dilation + 1) for dilation in dilations)
        for kernel, dilations in blocks
    )
    for rate, kernel in zip(reversed(rates), reversed(kernels), strict=True):
        first, last = first - block_reach, last + block_reach
        # Output o of a transposed convolution takes input i when 0 <= o + padding - i rate < kernel
        padding = (kernel - rate) // 2
        first = -((kernel - 1 - padding - first) // rate)
        last = (last + padding) // rate
    return max(-(first - 3), last + 3)  # conv_pre, of width 7


def validate_config(config: dict[str, Any]) -> None:
    """Raises ValueError for a config that is not of a unit HiFi-GAN with durations."""
    missing = [key for key in CONFIG_KEYS if not config.get(key)]
    if missing:
        raise ValueError(f"not the config of a unit HiFi-GAN with durations: {missing} missing")
    extra = [key for key in UNSUPPORTED_KEYS if config.get(key)]
    if extra:
        raise ValueError(f"{extra}: vocoders with speakers or pitch are not supported")
    if config["embedding_dim"] != config["model_in_dim"]:
        raise ValueError("model_in_dim is to equal embedding_dim")
    if config["dur_predictor_params"].get("var_pred_kernel_size") != 3:
        raise ValueError("dur_predictor_params.var_pred_kernel_size is to be 3")
    rates, kernels = config["upsample_rates"], config["upsample_kernel_sizes"]
    excess = [kernel - rate for kernel, rate in zip(kernels, rates, strict=True)]
    if any(number < 0 or number % 2 for number in excess):
        raise ValueError("each upsample_kernel_size is to exceed its upsample_rate by 0, 2, 4, ...")
    if any(kernel % 2 == 0 for kernel in config["resblock_kernel_sizes"]):
        raise ValueError("resblock_kernel_sizes are to be odd")


def _normed(conv: nn.Module) -> nn.Module:
    """Adds weight norm by the released checkpoint's names, which PyTorch calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv)
