"""The options of training_config.json, overridden on the command line.

First in the data flow: `load.py` reads and checks them, and the data backend's file
(`data_config.py`) that `data_backend_config` names. Nothing heavy is imported: a mistake is
reported within the first second, before any model loads. Names are the source document's. Keys
that begin with "_" are comments.

    python -m longcat_video_fft.precompute --config training_config.json --seed 1
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

OFFICIAL_MODEL = "meituan-longcat/LongCat-Video"


@dataclass(kw_only=True)
class TrainConfig:
    """The options of one run; README.md explains each."""

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
        """Returns where relative paths of input files are looked up: beside the config file."""
        return Path(self.source).parent if Path(self.source).is_file() else Path()

    @property
    def model(self) -> str:
        return self.pretrained_model_name_or_path or OFFICIAL_MODEL


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "source"}
TYPES = {name: hint for name, hint in get_type_hints(TrainConfig).items() if name in FIELDS}
