"""Compares the flags of `accelerate launch` with the config.

accelerate passes its flags on in the environment (accelerate/utils/launch.py, 1.15.0). Only its
process launching is used here: the training shards, compiles and accumulates by its own config. So
the five variables that name an option of the config must have the config's value, else the run ends
with an error; accelerate's own default looks like a flag that was not given, and the config
decides. All others are not read, which the log reports.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longcat_video_fft.options.config import TrainConfig

logger = logging.getLogger("longcat_video_fft")

# The variable, accelerate's default (None: it has none), the option that it is compared with.
COMPARED = (
    ("ACCELERATE_MIXED_PRECISION", "no", "mixed_precision"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None, "gradient_accumulation_steps"),
    ("ACCELERATE_USE_FSDP", "false", "fsdp_enable"),
    ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1", "fsdp_replicate_size"),
    ("PARALLELISM_CONFIG_CP_SIZE", "1", "context_parallel_size"),
)
NOT_READ = ("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_DYNAMO_")
OTHER_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def check_launcher(c: TrainConfig, environ: Mapping[str, str]) -> None:
    """Raises ValueError, naming both values, for a flag of accelerate's that contradicts `c`.

    Args:
        environ: os.environ, as `accelerate launch` or torchrun left it.
    """
    for name in OTHER_ENGINES:
        if environ.get(name, "false").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate launch: {name}={environ[name]} is not supported: FSDP 2 is used "
                "here; start with --config_file scripts/accelerate_fsdp2.yaml."
            )
    for name, default, option in COMPARED:
        value, own = environ.get(name), getattr(c, option)
        if value is not None and value.lower() not in (default, str(own).lower()):
            raise ValueError(
                f"accelerate launch: {name}={value} contradicts {option}={own!r} of {c.source}. "
                "The config decides: leave the flag out of the launch (or of accelerate's config "
                f"file), or set {option} to match where that is possible."
            )
    compared = [name for name, *_ in COMPARED]
    others = [n for n in sorted(environ) if n.startswith(NOT_READ) and n not in compared]
    if others:
        logger.info("accelerate's %s are not read: %s decides", ", ".join(others), c.source)
