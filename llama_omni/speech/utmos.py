"""Scores synthesized speech by UTMOS: a mean opinion score, predicted by a network.

A waveform is (num_samples,) float32 at 16 kHz.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llama_omni.options.hub import resolve_artifact
from llama_omni.speech.recognizer import NEEDS_EVAL, is_installed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

UTMOS_WEIGHTS = "Blinorot/UTMOS-PyTorch:utmos_state_dict.pt"  # what utmos-pytorch downloads itself


def load_utmos(source: str, *, device: torch.device | str = "cpu") -> Callable[[Tensor], float]:
    """Loads the UTMOS22 strong learner of utmos-pytorch: waveform -> score, 1 to 5.

    Raises:
        ValueError: the package is missing, or the file holds other weights.
    """
    if not is_installed("utmos_pytorch"):
        raise ValueError(f"--utmos: utmos-pytorch is not installed; {NEEDS_EVAL}")
    from utmos_pytorch import UTMOSScoreTorch

    path = resolve_artifact(source, field="--utmos")
    check_utmos_weights(path)
    model = UTMOSScoreTorch(ckpt_path=str(path), device=str(device))
    return lambda waveform: float(model.score(waveform.to(device)))


def check_utmos_weights(path: Path) -> None:
    """Raises ValueError where weights are missing: utmos-pytorch would score with random ones."""
    from utmos_pytorch.utmos_torch import UTMOSModel

    with torch.device("meta"):
        wanted = UTMOSModel().state_dict().keys()
    found = torch.load(path, map_location="meta", weights_only=True, mmap=True).keys()
    if missing := wanted - found:
        raise ValueError(
            f"--utmos {path}: {len(missing)} weights are missing, first {min(missing)}. Give "
            f"{UTMOS_WEIGHTS}, or a copy of that file."
        )
