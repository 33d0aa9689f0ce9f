"""Reads the sizes of a model from a folder's config.json, else from the tables below.

`plan/` uses them. It reads no weights, and imports neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_omni.model.flops import decoder_layer_params, llama_layer_params
from llama_omni.options.config import parse_decoder_shape

if TYPE_CHECKING:
    from llama_omni.options.config import TrainConfig

INNER_SIZE = 2048  # of the projector
MAX_STATES = 1500  # of Whisper's encoder
LLAMA_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size",
)  # fmt: skip
WHISPER_FIELDS = ("speech_encoder_hidden_size", "speech_encoder_layers", "mel_size")
# The values of these fields, and the bytes of the model's safetensors.
LLAMAS = {
    "meta-llama/Llama-3.1-8B": ((4096, 14336, 32, 32, 8, 128, 128256), 16.06e9),
    "meta-llama/Llama-3.2-1B": ((2048, 8192, 16, 32, 8, 64, 128256), 2.47e9),
    "meta-llama/Llama-3.2-3B": ((3072, 8192, 28, 24, 8, 128, 128256), 6.43e9),
}
LLAMAS |= {f"{name}-Instruct": sizes for name, sizes in LLAMAS.items()}
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


@dataclass(kw_only=True)
class ModelSizes:
    """Holds sizes by the names of the model's config.json, which `model/flops.py` also takes."""

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

    def __post_init__(self) -> None:
        """Counts the elements of the parts."""
        hidden, width = self.hidden_size, self.speech_encoder_hidden_size
        depth, frame_width, _, _ = parse_decoder_shape(self.ctc_decoder_config)
        self.llama_layer = llama_layer_params(self) + 2 * hidden
        self.embedding = self.vocab_size * hidden  # the head is another, never tied
        layers = self.num_hidden_layers * self.llama_layer
        self.language_model = layers + 2 * self.embedding + hidden
        self.encoder_block = 12 * width * (width + 1)  # 8 biases' worth (none on keys), 2 norms
        conv = 3 * width * (self.mel_size + width) + 2 * width
        blocks = self.speech_encoder_layers * self.encoder_block
        self.encoder = conv + (MAX_STATES + 2) * width + blocks
        joined = self.speech_encoder_ds_rate * width
        self.projector = (joined + 1) * INNER_SIZE + (INNER_SIZE + 1) * hidden
        self.generator_layer = decoder_layer_params(self) + 2 * frame_width
        ends = (hidden + 1) * frame_width + (frame_width + 1) * (self.unit_vocab_size + 1)
        self.generator = ends + depth * self.generator_layer

    def lora_layer(self, rank: int) -> int:
        """Counts the elements of the adapters on one layer's seven linears."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return rank * (7 * self.hidden_size + 2 * q + 2 * kv + 3 * self.intermediate_size)


def count_parameters(config: TrainConfig, sizes: ModelSizes) -> dict[str, tuple[int, int]]:
    """Counts (all, trained) elements of each part, named as in train.py's log."""
    lora = sizes.num_hidden_layers * sizes.lora_layer(config.lora_r) * config.lora_enable
    trained = lora or sizes.language_model * config.trains_backbone
    counts = {
        "language model": (sizes.language_model + lora, trained),
        "speech_encoder": (sizes.encoder, sizes.encoder * config.tune_speech_encoder),
        "speech_projector": (sizes.projector, sizes.projector * (config.stage == 1)),
    }
    if config.stage == 2:
        counts["speech_generator"] = (sizes.generator, sizes.generator)
    return counts


def load_sizes(config: TrainConfig, *, stage1: ModelSizes | None = None) -> ModelSizes:
    """Returns the sizes of the run's model; stage 2 takes `stage1`'s while it has no folder yet.

    Raises:
        ValueError: a hub id that the tables lack, or a folder without a Llama's or Whisper's sizes.
    """
    names = ("speech_encoder_ds_rate", "ctc_decoder_config", "unit_vocab_size")
    own: dict[str, Any] = {name: getattr(config, name) for name in names}
    llama, whisper = config.model_name_or_path, config.speech_encoder
    if config.stage == 2:
        if (Path(str(config.stage1_model_path)) / "config.json").is_file():
            llama = whisper = config.stage1_model_path
        elif stage1 is not None:
            return replace(stage1, **own, source="stage 1's model", download_bytes=0)
        else:  # its folder will come of the models that stage 1's config has by default
            llama = llama or "meta-llama/Llama-3.1-8B-Instruct"
            whisper = whisper or "openai/whisper-large-v3"
    if not llama or not whisper:
        raise ValueError(
            f"{config.source}: model_name_or_path={llama!r}, speech_encoder={whisper!r}: give both "
            "as a folder or a hub id."
        )
    llama_sizes, llama_bytes = _find(llama, LLAMAS, "model_name_or_path")
    whisper_sizes, whisper_bytes = _find(whisper, WHISPERS, "speech_encoder")
    own["source"] = " and ".join(dict.fromkeys((llama, whisper)))
    own["download_bytes"] = int(llama_bytes + whisper_bytes) * (config.stage == 1)
    return ModelSizes(**llama_sizes, **whisper_sizes, **own)


def _find(spec: str, table: dict[str, Any], field: str) -> tuple[dict[str, int], float]:
    """Returns (sizes, bytes to download) of a folder or of a model of the table."""
    fields = LLAMA_FIELDS if table is LLAMAS else WHISPER_FIELDS
    path = Path(spec) / "config.json"
    if not path.is_file():
        if spec in table:
            sizes, num_bytes = table[spec]
            return dict(zip(fields, sizes, strict=True)), num_bytes
        near = difflib.get_close_matches(spec, table, n=1, cutoff=0.5)
        raise ValueError(
            f"{field}={spec!r}: no folder with a config.json, and not in the built-in table"
            + (f". Did you mean {near[0]!r}?" if near else f" ({', '.join(table)}).")
        )
    try:
        values = json.loads(path.read_text("utf-8"))
        if table is LLAMAS:
            heads = values["num_attention_heads"]
            values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
            values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
        elif fields[0] not in values:  # as Whisper's own config.json has them
            names = ("d_model", "encoder_layers", "num_mel_bins")
            values |= {own: values[name] for own, name in zip(fields, names, strict=True)}
        return {name: values[name] for name in fields}, 0.0
    except KeyError as error:
        raise ValueError(f"{path}: no {error}; {field} is another kind of model.") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None
