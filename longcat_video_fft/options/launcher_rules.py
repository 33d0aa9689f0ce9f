"""What `accelerate launch` was told, against the config.

accelerate passes its flags on in the environment (accelerate/utils/launch.py, 1.15.0). Only its
process launching is used here: the training shards, compiles and accumulates by its own config. So
a flag must say what the config says, or it is refused; a flag with accelerate's own default cannot
be told from one that was not given, and the config decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longcat_video_fft.options.config_rules import BLOCK_CLASS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longcat_video_fft.options.config import TrainConfig

BACKENDS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
# (variable, accelerate's default or None, the option that it is compared with)
GENERAL = (
    ("ACCELERATE_MIXED_PRECISION", "no", "mixed_precision"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None, "gradient_accumulation_steps"),
)
SHARDING = (
    ("FSDP_VERSION", None, "fsdp_version"),
    ("FSDP_RESHARD_AFTER_FORWARD", "true", "fsdp_reshard_after_forward"),
    ("FSDP_STATE_DICT_TYPE", None, "fsdp_state_dict_type"),
    ("FSDP_AUTO_WRAP_POLICY", None, "fsdp_auto_wrap_policy"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "false", "gradient_checkpointing"),
)
PARALLELISM = (
    ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1", "fsdp_replicate_size"),
    ("PARALLELISM_CONFIG_CP_SIZE", "1", "context_parallel_size"),
)
# (variable, the values that are what happens here, why another is refused and what to do)
FIXED_SHARDING = (
    (
        "FSDP_OFFLOAD_PARAMS",
        ("false",),
        "say how many blocks wait in host memory with musubi_blocks_to_swap instead",
    ),
    (
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD",
        ("false",),
        "say of how many blocks it does that with activation_offload_blocks instead",
    ),
    (
        "FSDP_SHARDING_STRATEGY",
        ("full_shard", "1"),
        "it belongs to FSDP 1; fsdp_reshard_after_forward and fsdp_replicate_size say the same",
    ),
    ("FSDP_TRANSFORMER_CLS_TO_WRAP", (BLOCK_CLASS.lower(),), f"the model's is {BLOCK_CLASS}"),
    ("FSDP_FORWARD_PREFETCH", ("false",), "FSDP 2 fetches the next block ahead by itself"),
    (
        "FSDP_BACKWARD_PREFETCH",
        ("backward_pre", "1"),
        "FSDP 2 fetches the next block ahead by itself",
    ),
    ("FSDP_USE_ORIG_PARAMS", ("true",), "FSDP 2 always keeps the original parameters"),
    ("FSDP_SYNC_MODULE_STATES", ("true",), "every process reads its own slices of the weights"),
    ("FSDP_IGNORED_MODULES", ("", "none"), "all weights are trained and sharded"),
)
FIXED = (
    (
        "ACCELERATE_DYNAMO_BACKEND",
        ("no", "inductor"),
        "blocks are compiled with inductor, where compile is true",
    ),
    ("ACCELERATE_DYNAMO_MODE", ("default",), "blocks are compiled in the default mode"),
    ("ACCELERATE_DYNAMO_USE_DYNAMIC", ("false",), "each bucket's shape is compiled for itself"),
    ("PARALLELISM_CONFIG_TP_SIZE", ("1",), "there is no tensor parallelism here"),
    ("PARALLELISM_CONFIG_SP_SIZE", ("1",), "use context_parallel_size, which is Ulysses"),
)


def check_launcher(c: TrainConfig, environ: Mapping[str, str]) -> None:
    """Raises ValueError, naming both values, for a flag of accelerate's that is not what happens.

    Args:
        environ: os.environ, as `accelerate launch` or torchrun left it.
    """
    for name, product in BACKENDS.items():
        if _is_true(environ, name):
            raise ValueError(
                f"accelerate launch: {name}={environ[name]} is refused: {product} is not used "
                "here, FSDP 2 is; start with --config_file scripts/accelerate_fsdp2.yaml."
            )
    compared, fixed = GENERAL, FIXED
    if _is_true(environ, "ACCELERATE_USE_FSDP"):
        compared, fixed = compared + SHARDING, fixed + FIXED_SHARDING
        if not c.fsdp_enable:
            raise ValueError(
                "accelerate launch: ACCELERATE_USE_FSDP=true contradicts fsdp_enable=false of "
                f"{c.source}; leave out --use_fsdp, or set fsdp_enable to true."
            )
    if _is_true(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        compared += PARALLELISM
        _check_shards(c, environ)
    for name, default, option in compared:
        _compare(c, environ, name, default=default, option=option)
    for name, known, reason in fixed:
        value = environ.get(name)
        if value is not None and value.lower() not in known:
            raise ValueError(
                f"accelerate launch: {name}={value} is refused ({known[0] or 'nothing'} is what "
                f"happens here): {reason}."
            )
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").lower() == "inductor" and not c.compile:
        raise ValueError(
            "accelerate launch: ACCELERATE_DYNAMO_BACKEND=INDUCTOR contradicts compile=false of "
            f"{c.source}; change one of them."
        )


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("true", "1")


def _compare(
    c: TrainConfig, environ: Mapping[str, str], name: str, *, default: str | None, option: str
) -> None:
    value, own = environ.get(name), getattr(c, option)
    if value is None or value.lower() in (default, str(own).lower()):
        return
    raise ValueError(
        f"accelerate launch: {name}={value} contradicts {option}={own!r} of {c.source}. The config "
        f"decides: leave the flag out of the launch (or of accelerate's config file), or set "
        f"{option} to match where that is possible."
    )


def _check_shards(c: TrainConfig, environ: Mapping[str, str]) -> None:
    name = "PARALLELISM_CONFIG_DP_SHARD_SIZE"
    value, world_size = environ.get(name, "1"), int(environ.get("WORLD_SIZE", "1"))
    own = world_size // (c.fsdp_replicate_size * c.context_parallel_size)
    if value not in ("1", str(own)):
        raise ValueError(
            f"accelerate launch: {name}={value} contradicts the {own} that {world_size} devices "
            f"give with fsdp_replicate_size={c.fsdp_replicate_size} and context_parallel_size="
            f"{c.context_parallel_size} of {c.source}; leave the flag out."
        )
