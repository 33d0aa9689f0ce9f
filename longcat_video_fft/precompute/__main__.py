"""Phase 1: videos and captions -> caches of latents and embeddings. Run it as often as you like.

    accelerate launch --num_processes=8 -m longcat_video_fft.precompute --config FILE
    python -m longcat_video_fft.precompute --config FILE --dry_run      # only the plan
    python -m longcat_video_fft.precompute --config FILE --verify [--repair]

Any number of processes and nodes; the cache folders must be seen by all. What is there is kept,
what is missing is made, what cannot be made is named. Read next: options/data_config.py,
storage/storage.py, metadata.py, survey.py, encoding.py, dataset/cache.py.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from longcat_video_fft.options.launch import start_logging
from longcat_video_fft.options.load import read_configs

if TYPE_CHECKING:
    from longcat_video_fft.options.data_config import DataConfig

logger = logging.getLogger("longcat_video_fft")

FLAGS = ("--dry_run", "--verify", "--repair", "--retry_failed")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    flags = {option for option in argv if option in FLAGS}
    is_main = os.environ.get("RANK", "0") == "0"
    start_logging(is_main=is_main)
    try:
        config, data = read_configs([option for option in argv if option not in flags])
        check_caches_are_folders(data)
        if "--repair" in flags and "--verify" not in flags:
            raise ValueError("the command line: --repair goes with --verify.")
    except ValueError as error:
        if is_main:  # all processes find the same
            sys.stderr.write(f"error: {error}\n")
        return 2
    # Heavy imports wait until the config is known to be sound.
    from tqdm.contrib.logging import logging_redirect_tqdm

    from longcat_video_fft.precompute.job import make_caches
    from longcat_video_fft.precompute.processes import Processes
    from longcat_video_fft.precompute.state import verify

    try:
        with logging_redirect_tqdm():
            if "--verify" in flags:
                return verify(data, repairs="--repair" in flags)
            make_caches(
                config,
                data,
                Processes(),
                is_dry="--dry_run" in flags,
                retries_failed="--retry_failed" in flags,
            )
    except (ValueError, OSError, RuntimeError) as error:
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def check_caches_are_folders(data: DataConfig) -> None:
    """Raises ValueError when a cache is in S3, where the training reads it but none is made."""
    for name in (data.videos.cache_dir_vae, data.text.cache_dir):
        if name.startswith("s3://"):
            raise ValueError(
                f"{data.source}: {name}: a cache is made in a folder and can be read from S3. Make "
                "it on a disk, copy it there (aws s3 sync), and then give this address."
            )


if __name__ == "__main__":
    sys.exit(main())
