"""What `__main__.py` reckons with: sizes of the models, machines and lengths of a dataset.

Sizes come from a folder's config.json where there is one, else from the tables below; nothing is
loaded and neither torch nor transformers is imported.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_omni.model.flops import BatchSize, decoder_layer_params, llama_layer_params
from llama_omni.options.config import parse_decoder_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_omni.options.config import TrainConfig

GIB = 2**30
INNER_SIZE = 2048  # of the projector
MAX_STATES = 1500  # of Whisper's encoder
DEFAULT_LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
DEFAULT_WHISPER = "openai/whisper-large-v3"

# (hidden, feed-forward, layers, heads, kv heads, head, vocabulary), bytes of its safetensors
LLAMAS = {
    "meta-llama/Llama-3.1-8B": ((4096, 14336, 32, 32, 8, 128, 128256), 16.06e9),
    "meta-llama/Llama-3.2-1B": ((2048, 8192, 16, 32, 8, 64, 128256), 2.47e9),
    "meta-llama/Llama-3.2-3B": ((3072, 8192, 28, 24, 8, 128, 128256), 6.43e9),
}
LLAMAS |= {f"{name}-Instruct": sizes for name, sizes in LLAMAS.items()}
# (width, layers, mel bins), bytes of its safetensors (large-v3 also holds a copy in float32)
WHISPERS = {
    "openai/whisper-tiny": ((384, 4, 80), 0.15e9),
    "openai/whisper-base": ((512, 6, 80), 0.29e9),
    "openai/whisper-small": ((768, 12, 80), 0.97e9),
    "openai/whisper-medium": ((1024, 24, 80), 3.06e9),
    "openai/whisper-large": ((1280, 32, 80), 6.17e9),
    "openai/whisper-large-v2": ((1280, 32, 80), 6.17e9),
    "openai/whisper-large-v3": ((1280, 32, 128), 3.09e9),
    "openai/whisper-large-v3-turbo": ((1280, 32, 128), 1.62e9),
}
# What torch reports as total memory (GiB), and the name that flops.PEAK_FLOPS knows.
GPUS = {
    "b200": (178.0, "B200"),
    "h200": (139.8, "H200"),
    "gh200": (94.5, "GH200"),
    "h100-80": (79.1, "H100"),
    "a100-80": (79.2, "A100"),
    "a100-40": (39.4, "A100"),
    "l40": (44.4, "L40"),
    "l40s": (44.4, "L40S"),
    "rtx4090": (23.5, "RTX 4090"),
    "rtx3090": (23.6, "RTX 3090"),
}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Named as in the model's config.json, so that `model/flops.py` takes it for one."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    speech_encoder_hidden_size: int
    speech_encoder_layers: int
    mel_size: int
    speech_encoder_ds_rate: int = 5
    ctc_decoder_config: str = "(2,4096,32,11008)"
    unit_vocab_size: int = 1000
    source: str = ""
    download_bytes: int = 0

    @property
    def llama_layer(self) -> int:
        return llama_layer_params(self) + 2 * self.hidden_size

    @property
    def embedding(self) -> int:
        """Elements of the token table; the head is another of the same size, never tied."""
        return self.vocab_size * self.hidden_size

    @property
    def language_model(self) -> int:
        return self.num_hidden_layers * self.llama_layer + 2 * self.embedding + self.hidden_size

    @property
    def encoder_block(self) -> int:
        width = self.speech_encoder_hidden_size
        return 12 * width * width + 12 * width  # 8 biases' worth (no bias on keys), 2 norms

    @property
    def encoder(self) -> int:
        width = self.speech_encoder_hidden_size
        conv = 3 * width * (self.mel_size + width) + 2 * width
        return (
            conv
            + MAX_STATES * width
            + self.speech_encoder_layers * self.encoder_block
            + (2 * width)
        )

    @property
    def projector(self) -> int:
        joined = self.speech_encoder_ds_rate * self.speech_encoder_hidden_size
        return (joined + 1) * INNER_SIZE + (INNER_SIZE + 1) * self.hidden_size

    @property
    def generator_layer(self) -> int:
        return decoder_layer_params(self) + 2 * parse_decoder_shape(self.ctc_decoder_config)[1]

    @property
    def generator(self) -> int:
        layers, width, _, _ = parse_decoder_shape(self.ctc_decoder_config)
        ends = (self.hidden_size + 1) * width + (width + 1) * (self.unit_vocab_size + 1)
        return ends + layers * self.generator_layer

    def lora_layer(self, rank: int) -> int:
        """Elements of the adapters on one layer's seven linears."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, ffn = self.hidden_size, self.intermediate_size
        return rank * (2 * (hidden + q) + 2 * (hidden + kv) + 3 * (hidden + ffn))


def load_sizes(config: TrainConfig, *, stage1: ModelSizes | None = None) -> ModelSizes:
    """Sizes of the run's model. Stage 2 takes `stage1`'s while its folder does not exist yet.

    Raises:
        ValueError: a hub id that the tables lack, or a folder without a Llama's or Whisper's sizes.
    """
    own = {
        "speech_encoder_ds_rate": config.speech_encoder_ds_rate,
        "ctc_decoder_config": config.ctc_decoder_config,
        "unit_vocab_size": config.unit_vocab_size,
    }
    llama, whisper = config.model_name_or_path, config.speech_encoder
    if config.stage == 2:
        folder = Path(str(config.stage1_model_path))
        if (folder / "config.json").is_file():
            values = {**_read_llama(folder), **_read_whisper(folder)}
            return ModelSizes(**{**values, **own}, source=f"{folder}/config.json")
        if stage1 is not None:
            return replace(stage1, **own, source="stage 1's", download_bytes=0)
        # Its folder will come of the same models as stage 1's config has by default.
        llama, whisper = llama or DEFAULT_LLAMA, whisper or DEFAULT_WHISPER
    if not llama or not whisper:
        raise ValueError(
            f"{config.source}: model_name_or_path={llama!r}, speech_encoder={whisper!r}: give both "
            "as a folder or a hub id."
        )
    llama_sizes, llama_source, llama_bytes = _find(llama, LLAMAS, _read_llama, "model_name_or_path")
    sizes, source, num_bytes = _find(whisper, WHISPERS, _read_whisper, "speech_encoder")
    assumed = "assumed until stage 1 is done: " if config.stage == 2 else ""
    return ModelSizes(
        **{**llama_sizes, **sizes, **own},
        source=f"{assumed}{llama_source}; {source}",
        download_bytes=int(llama_bytes + num_bytes) * (config.stage == 1),
    )


def _find(spec: str, table: dict[str, Any], read: Any, field: str) -> tuple[dict, str, float]:
    """(sizes, where they were found, bytes to download)."""
    folder = Path(spec)
    if (folder / "config.json").is_file():
        return read(folder), f"{folder}/config.json", 0.0
    if spec in table:
        row, num_bytes = table[spec]
        if table is WHISPERS:
            names = ("speech_encoder_hidden_size", "speech_encoder_layers", "mel_size")
        else:
            names = (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "vocab_size",
            )  # fmt: skip
        return dict(zip(names, row, strict=True)), f"{spec} (built-in table)", num_bytes
    near = difflib.get_close_matches(spec, table, n=1, cutoff=0.5)
    raise ValueError(
        f"{field}={spec!r}: no folder with a config.json, and not in the built-in table"
        + (f". Did you mean {near[0]!r}?" if near else f" ({', '.join(table)}).")
    )


def _read_llama(folder: Path) -> dict[str, int]:
    values = _read_json(folder)
    try:
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        return {
            "hidden_size": hidden,
            "intermediate_size": values["intermediate_size"],
            "num_hidden_layers": values["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": values.get("num_key_value_heads") or heads,
            "head_dim": values.get("head_dim") or hidden // heads,
            "vocab_size": values["vocab_size"],
        }
    except KeyError as error:
        raise ValueError(f"{folder}/config.json: no {error}; not a Llama's config.") from None


def _read_whisper(folder: Path) -> dict[str, int]:
    values = _read_json(folder)
    ours = ("speech_encoder_hidden_size", "speech_encoder_layers", "mel_size")
    for names in (ours, ("d_model", "encoder_layers", "num_mel_bins")):
        if all(name in values for name in names):
            return {own: values[name] for own, name in zip(ours, names, strict=True)}
    raise ValueError(f"{folder}/config.json: no sizes of a Whisper encoder (d_model, ...).")


def _read_json(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: not valid JSON ({error}).") from None


@dataclass(frozen=True)
class Machine:
    name: str
    gpu: str  # as flops.PEAK_FLOPS has it
    count: int
    gpu_bytes: int


def parse_machine(text: str) -> Machine:
    """`h200x8` or `a100-80x4`: a GPU of the table and how many.

    Raises:
        ValueError: names the nearest known GPU.
    """
    found = re.fullmatch(r"(.+?)x(\d+)", text.lower())
    name, count = (found[1], int(found[2])) if found else (text.lower(), 0)
    if name in GPUS and count > 0:
        memory, gpu = GPUS[name]
        return Machine(text.lower(), gpu, count, int(memory * GIB))
    near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"--machine {text!r}: not GPUxCOUNT. Did you mean '{near}x{count or 1}'? "
        f"Known GPUs: {', '.join(GPUS)}."
    )


@dataclass(frozen=True)
class SampleLength:
    """Of one training sample."""

    clips: tuple[float, ...]  # seconds
    text_tokens: int  # prompt and answers, <|eot_id|> included
    answer_tokens: int  # those of them that are learned
    units: int = 0


@dataclass(frozen=True)
class Lengths:
    """Lengths of the samples looked at; `num_samples` is how many the dataset has."""

    samples: tuple[SampleLength, ...]
    num_samples: int
    source: str

    @staticmethod
    def paper(num_points: int = 199) -> Lengths:
        """Means of InstructS2S-200K (arXiv 2409.06666, table 1), spread by a normal distribution.

        The paper gives no spread; a third of the mean is taken, which makes the longest of a large
        set about twice the mean. 61 prompt tokens are what Llama 3's tokenizer gives.
        """
        normal = statistics.NormalDist(1.0, 1 / 3)
        factors = [max(0.2, normal.inv_cdf((i + 0.5) / num_points)) for i in range(num_points)]
        samples = tuple(
            SampleLength((7.5 * f,), 61 + round(40.5 * f), round(40.5 * f), round(553.6 * f))
            for f in factors
        )
        return Lengths(samples, 200_000, "means of InstructS2S-200K (arXiv 2409.06666, table 1)")

    def batch(self, config: TrainConfig, *, is_largest: bool) -> BatchSize:
        """One micro-batch: the largest that a run will meet, or the expected one.

        Padding goes to the longest sample. The expected longest of B samples is exact for draws
        from `samples`; the largest sum of answer tokens is taken 3 standard deviations up.
        """
        size = config.per_device_train_batch_size
        clips = [_mel_frames(s, config) for sample in self.samples for s in sample.clips]
        tokens = [_num_tokens(sample, config) for sample in self.samples]
        frames = [
            max(sample.answer_tokens * config.ctc_upsample_factor, sample.units)
            for sample in self.samples
        ]
        answers = [sample.answer_tokens for sample in self.samples]
        longest = max if is_largest else lambda values: expected_longest(values, size)
        spread = 3 * math.sqrt(size) * statistics.pstdev(answers) if is_largest else 0.0
        answer_tokens = min(size * max(answers), size * statistics.fmean(answers) + spread)
        return BatchSize(
            clips=math.ceil(size * len(clips) / len(self.samples)),
            mel_frames=math.ceil(longest(clips)),
            sequences=size,
            tokens=math.ceil(longest(tokens)),
            answer_tokens=math.ceil(answer_tokens),
            unit_frames=math.ceil(longest(frames)) if config.stage == 2 else 0,
        )


def expected_longest(values: Sequence[float], count: int) -> float:
    """Mean of the largest of `count` draws with replacement."""
    ordered, total = sorted(values), len(values)
    return sum(
        value * (((i + 1) / total) ** count - (i / total) ** count)
        for i, value in enumerate(ordered)
    )


def _mel_frames(seconds: float, config: TrainConfig) -> int:
    return 3000 if config.pad_audio_to_30s else 2 * math.ceil(seconds * 50)


def _num_tokens(sample: SampleLength, config: TrainConfig) -> int:
    speech = (_mel_frames(s, config) // 2 // config.speech_encoder_ds_rate for s in sample.clips)
    return sample.text_tokens + sum(speech)
