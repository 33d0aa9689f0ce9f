"""The options of training_config.json, overridden on the command line, checked.

First in the data flow; `data_config.py` reads the data backend's file that `data_backend_config`
names. Neither imports anything heavy: a mistake is reported within the first second, before any
model loads. Names are the source document's. Keys that begin with "_" are comments.

    python -m longcat_video_fft.precompute --config training_config.json --seed 1
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from longcat_video_fft.options.config_rules import validate_config

OFFICIAL_MODEL = "meituan-longcat/LongCat-Video"


@dataclass(kw_only=True)
class TrainConfig:
    """One run. README.md explains each option."""

    # Model: a folder or hub id with vae/, text_encoder/, tokenizer/ (and dit/ for the training).
    model_type: str = "full"
    model_family: str = "longcat_video"
    model_flavour: str = "final"
    pretrained_model_name_or_path: str | None = None  # null: the official one
    base_model_precision: str = "bf16"
    attention_mechanism: str = "diffusers"

    # Data and its preparation.
    data_backend_config: str | None = None
    max_text_tokens: int = 512  # text keys of the model, of any caption's length
    vae_dtype: str = "bf16"
    vae_chunk_frames: int = 12
    vae_compile: bool = True
    decode_workers: int | None = None  # null: the processor's cores, shared by the node's processes
    seed: int = 42

    # Training, which reads the same file.
    output_dir: str = "output/longcat-fullfinetune"
    logging_dir: str = "logs/longcat-fullfinetune"
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 4
    gradient_checkpointing: bool = True
    gradient_checkpointing_mode: str = "selective"  # or "selective_ffn", "full"
    uncheckpointed_blocks: int = 0
    activation_offload_blocks: int = 0
    transformer_init: str = "pretrained"
    resume_from_checkpoint: str | None = None
    flow_shift: float = 12.0
    timestep_sampling: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    caption_dropout_probability: float = 0.1
    image_to_video_probability: float = 0.0
    continuation_probability: float = 0.0
    condition_noise_max: float = 0.05
    learning_rate: float = 1e-5
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 500
    max_train_steps: int = 30000
    checkpointing_steps: int = 2500
    checkpoints_total_limit: int = 5
    optimizer: str = "adamw_bf16"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    mixed_precision: str = "bf16"
    compile: bool = True
    fp8_linears: bool = False
    dataloader_num_workers: int = 2
    logging_steps: int = 1
    num_held_out_samples: int = 0
    disable_tf32: bool = False
    fsdp_enable: bool = True
    fsdp_version: int = 2
    fsdp_state_dict_type: str = "SHARDED_STATE_DICT"
    fsdp_auto_wrap_policy: str = "TRANSFORMER_BASED_WRAP"
    fsdp_cpu_ram_efficient_loading: bool = True
    fsdp_reshard_after_forward: bool = True
    fsdp_replicate_size: int = 1
    context_parallel_size: int = 1
    musubi_blocks_to_swap: int = 0
    musubi_block_swap_device: str = "cpu"
    validation_prompt: str | None = None
    validation_negative_prompt: str = ""
    validation_resolution: str = "480x832"
    validation_num_video_frames: int = 93
    validation_num_inference_steps: int = 40
    validation_guidance: float = 4.0
    validation_step_interval: int = 2500
    num_validation_images: int = 2
    report_to: str = "tensorboard"

    # The dry run's machine; null: what is found here.
    dry_run: bool = False
    num_gpus: int | None = None
    gpu_memory_gib: float | None = None

    # Where the values came from, for messages.
    source: str = field(default="the command line", repr=False)

    @property
    def folder(self) -> Path:
        """Where relative paths of input files are looked up: beside the config file."""
        return Path(self.source).parent if Path(self.source).is_file() else Path()

    @property
    def model(self) -> str:
        return self.pretrained_model_name_or_path or OFFICIAL_MODEL


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "source"}
TYPES = {name: hint for name, hint in get_type_hints(TrainConfig).items() if name in FIELDS}

# The source document's older names, by today's.
OLDER_NAMES = {
    "validation_step_interval": "validation_every_n_steps",
    "num_validation_images": "num_validation_videos",
}


def load_config(argv: list[str]) -> TrainConfig:
    """Reads `--config FILE [--key value | --key=value ...]`; later values win.

    Raises:
        ValueError: unreadable file, unknown key (the nearest known one is named), wrong type, or a
            value that cannot work.
    """
    words = parse_words(argv)
    values: dict[str, Any] = {}
    source = words.pop("config", None) or "the command line"
    if source != "the command line":
        values = check_values(rename_older(read_json_object(Path(source)), source), TYPES, source)
    words = rename_older(words, "the command line")
    given = {key: parse_text(key, text) for key, text in words.items()}
    values.update(check_values(given, TYPES, "the command line"))
    config = TrainConfig(**values, source=source)
    validate_config(config)
    return config


def rename_older(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """`raw` with today's names. Raises ValueError when both are there, with two values."""
    raw = dict(raw)
    for name, older in OLDER_NAMES.items():
        if older in raw:
            value = raw.pop(older)
            if raw.setdefault(name, value) != value:
                raise ValueError(
                    f"{source}: {older} is {name} by its older name, and they have two values, "
                    f"{value!r} and {raw[name]!r}; delete one."
                )
    return raw


def read_json(path: Path) -> Any:
    """Raises ValueError when there is no such file or it is not JSON."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config file ({path.absolute()}).")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Mend the line it names.") from None


def read_json_object(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__}, not an object of options.")
    return raw  # pyright: ignore[reportUnknownVariableType]


def parse_words(argv: list[str]) -> dict[str, str]:
    """`--key value`, `--key=value` and bare `--flag` (true) as texts by key."""
    words: dict[str, str] = {}
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--"):
            raise ValueError(
                f"the command line: {word!r} has no key. Write --key value, for example --seed 1."
            )
        key, has_equals, text = word[2:].partition("=")
        position += 1
        if not has_equals:
            is_value = position < len(argv) and not argv[position].startswith("--")
            text = argv[position] if is_value else "true"
            position += is_value
        words[key] = text
    return words


def parse_text(key: str, text: str) -> Any:
    """A command-line word as the JSON value that the key's type asks for."""
    allowed = get_args(TYPES.get(key, str)) or (TYPES.get(key, str),)
    if text.lower() in ("null", "none") and type(None) in allowed:
        return None
    if bool in allowed:
        return {"true": True, "false": False}.get(text.lower(), text)
    for number in (int, float):
        if number in allowed:
            try:
                return number(text)
            except ValueError:
                continue
    return text


def check_values(raw: dict[str, Any], types: dict[str, Any], source: str) -> dict[str, Any]:
    """The values of known keys with the right types; keys that begin with "_" are left out."""
    return {
        key: check_value(key, value, types, source)
        for key, value in raw.items()
        if not key.startswith("_")
    }


def check_value(key: str, value: Any, types: dict[str, Any], source: str) -> Any:
    """`value` when `key` is known and takes its type; whole numbers are taken as floats."""
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else " README.md lists the known keys."
        raise ValueError(f"{source}: unknown key {key!r}.{hint}")
    hint = types[key]
    allowed = (hint,) if get_origin(hint) in (list, dict) else get_args(hint) or (hint,)
    kinds = tuple(get_origin(kind) or kind for kind in allowed)
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    shown = key if "access_key" in key else f"{key}={value!r}"  # a secret is not repeated
    raise ValueError(f"{source}: {shown} must be of type {names}.")
