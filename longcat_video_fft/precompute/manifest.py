"""What made a cache, so that nothing made otherwise is ever mixed in.

`manifest.json` holds digests of the encoder's files and the rules of cutting; precompute and the
training compare it with what they are about to use, and name what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from longcat_video_fft.options.buckets import LATENT_CHANNELS, BucketRule

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = 1  # of shards and index
WEIGHT_ENDINGS = (".safetensors", ".json", ".model", ".txt")
# That of media/decoding.py, in the spelling of existing caches.
CROP_RULE = "lanczos to cover, centre"  # codespell:ignore centre


def describe_latents(vae_folder: Path, rule: BucketRule, *, vae_dtype: str) -> dict[str, Any]:
    """Returns the identity of a latent cache."""
    return {
        "format": FORMAT,
        "holds": "latents, (mean - latents_mean) / latents_std, bfloat16",
        "channels": LATENT_CHANNELS,
        "vae_sha256": digest_folder(vae_folder),
        "vae_dtype": vae_dtype,
        "frame_buckets": list(rule.frames),
        "target_fps": "native" if rule.target_fps is None else rule.target_fps,
        "shapes": [list(shape) for _, shape in rule.shapes],
        "crop": CROP_RULE if rule.crop else "squeezed",
    }


def describe_text(encoder: Path, tokenizer: Path, *, max_tokens: int) -> dict[str, Any]:
    """Returns the identity of a cache of caption embeddings."""
    return {
        "format": FORMAT,
        "holds": "last_hidden_state of the valid tokens, bfloat16",
        "text_encoder_sha256": digest_folder(encoder),
        "tokenizer_sha256": digest_folder(tokenizer),
        "max_tokens": max_tokens,
        "cleaning": "ftfy, html unescape twice, white space",
    }


def check_manifest(folder: Path, identity: dict[str, Any]) -> None:
    """Writes the manifest of a new cache; compares that of one which is there.

    Raises:
        ValueError: the cache was made otherwise; what differs is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.is_file():
        partial = folder / f".{MANIFEST}.{os.getpid()}"
        partial.write_text(json.dumps(identity, indent=2) + "\n", "utf-8")
        partial.replace(path)
        return
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Delete {folder}.") from error
    differing = [
        f"{key} is {found.get(key)!r} there and {identity.get(key)!r} here"
        for key in sorted(found.keys() | identity.keys())
        if found.get(key) != identity.get(key)
    ]
    if differing:
        raise ValueError(
            f"{folder}: this cache was made otherwise: {'; '.join(differing)}. Set the options "
            "back, give another folder, or delete this one to make it again."
        )


def digest_folder(folder: Path) -> str:
    """Returns sha256 over the names and contents of a model's files."""
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_ENDINGS)
    if not files:
        raise ValueError(f"{folder}: holds no {', '.join(WEIGHT_ENDINGS)} file.")
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(_digest_file, files)
        lines = [f"{path.name} {digest}" for path, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
