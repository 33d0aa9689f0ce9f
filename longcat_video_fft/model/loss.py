"""The loss: the mean squared error of the predicted velocity, a number a sample.

flow_matching.py makes the target; training/loop.py divides by the global number of samples.
B samples; T latent frames, h x w latents each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from longcat_video_fft.model.flow_matching import Noised


def sample_losses(prediction: Tensor, noised: Noised) -> Tensor:
    """Computes (B, 16, T, h, w) -> (B,) float32: mean squared errors over the frames to predict."""
    error = prediction.float() - noised.target
    return error[:, :, noised.num_cond_latents :].square().mean(dim=(1, 2, 3, 4))
