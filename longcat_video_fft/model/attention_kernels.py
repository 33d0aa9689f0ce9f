"""Which kernel computes the attention: one of torch's backends, or FlashAttention-4.

FlashAttention-4 is the package flash-attn-4, for Hopper and Blackwell. Here it is an operator of
torch, since torch's own switch to it expects an older version: as such it compiles into a block's
graph, and checkpointing can keep its output.

B batch, H heads, N queries, M keys, D head size.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longcat_video_fft.options.launch import is_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longcat_video_fft.model.attention import Kernel

# Best first: on an H200 at 37,440 tokens FlashAttention-4 (a package) is 1.16 times as fast as
# cuDNN, and that is 1.7 times as fast as torch's own flash (README.md).
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FLASH4_GPUS, FLASH4_HEADS = (9, 10), (64, 128)  # Hopper and Blackwell; head sizes


def resolve(mechanism: str, head_dim: int, device: torch.device) -> str:
    """Returns `attention_mechanism` as `use_backend` takes it: "diffusers" becomes "flash4" where
    the package flash-attn-4 is installed and supports the GPU."""
    if mechanism != "diffusers" or device.type != "cuda" or head_dim not in FLASH4_HEADS:
        return mechanism
    is_new = torch.cuda.get_device_capability(device)[0] in FLASH4_GPUS
    return "flash4" if is_new and is_installed("flash-attn-4") else mechanism


@contextlib.contextmanager
def use_backend(mechanism: str) -> Iterator[None]:
    """Makes torch use, as `resolve` says, the first backend that works or the one that is named.
    ("flash4" is no backend of torch's: `choose_kernel` has it.)"""
    backends = [BACKENDS[mechanism]] if mechanism in BACKENDS else list(BACKENDS.values())
    with sdpa_kernel(backends, set_priority=True):
        yield


def choose_kernel(mechanism: str) -> Kernel | None:
    """Returns what `transformer.set_attention_kernel` takes: None leaves attention to torch."""
    return attend_flash4 if mechanism == "flash4" else None


def chosen_backend(mechanism: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Returns the name of the backend that is used there, for the log."""
    if mechanism == "flash4" and dtype == torch.bfloat16:
        return mechanism
    q = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device)
    with use_backend(mechanism):
        choice = SDPBackend(torch._fused_sdp_choice(q, q, q))  # pyright: ignore
    return next((name for name, backend in BACKENDS.items() if backend == choice), choice.name)


def attend_flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes softmax(q k^T / sqrt(D)) v, all (B, H, N or M, D) in bf16 on a GPU."""
    return flash4(q, k, v)[0]


@torch.library.custom_op("longcat_video_fft::flash4", mutates_args=())
def flash4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (B, H, N, D), in memory (B, N, H, D), and the log-sum-exp (B, H, N) float32."""
    from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore[reportMissingImports]

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, log_sums = _flash_attn_fwd(q, k, v, return_lse=True)[:2]
    return out.transpose(1, 2), log_sums


@flash4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _as_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("longcat_video_fft::flash4_backward", mutates_args=())
def flash4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]

    q, k, v, out, grad = (x.transpose(1, 2) for x in (q, k, v, out, grad))
    grads = [x.new_empty(x.shape) for x in (q, k, v)]  # else laid out as q, k and v are
    _flash_attn_bwd(q, k, v, out, grad, log_sums, dq=grads[0], dk=grads[1], dv=grads[2])
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
    return grad_q, grad_k, grad_v


@flash4_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _as_out(q), _as_out(k), _as_out(v)


def _as_out(x: Tensor) -> Tensor:
    """Returns an empty (B, H, N, D), in memory (B, N, H, D)."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
    return flash4_backward(grad, *ctx.saved_tensors)


flash4.register_autograd(_backward, setup_context=_save)
