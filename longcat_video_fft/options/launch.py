"""The start of every command: what is logged, and whether an optional package is installed."""

from __future__ import annotations

import logging
from importlib.metadata import distributions


def start_logging(*, is_main: bool) -> None:
    """Sets up logging: the main process logs INFO, the others only warnings and errors."""
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for library in ("httpx", "httpx2", "botocore"):  # a line a request
        logging.getLogger(library).setLevel(logging.WARNING)
    # The tokenizer warns of captions that are too long; the survey counts them.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def is_installed(package: str) -> bool:
    return any(distributions(name=package))
