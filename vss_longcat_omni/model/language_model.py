"""LongCat-Flash: 28 layers of two attentions, two dense MLPs and one mixture of experts.

Parameter names are the released ones (transformers' too), but that the experts of a layer are two
tensors here and 1,536 in the released files; `loading.py` knows how these lie in one another.

Shapes: T packed tokens, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vss_longcat_omni.model.attention import (
    LatentCache,
    LongcatFlashMLA,
    RMSNorm,
    compute_rotation,
)
from vss_longcat_omni.model.experts import LongcatFlashMoE
from vss_longcat_omni.model.fused import fused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.model.config import LongcatOmniConfig


class LongcatFlashMLP(nn.Module):
    def __init__(self, config: LongcatOmniConfig) -> None:
        super().__init__()
        hidden_size, width = config.hidden_size, config.ffn_hidden_size
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_times(self.gate_proj(x), self.up_proj(x)))


@fused
def silu_times(gates: Tensor, ups: Tensor) -> Tensor:
    return F.silu(gates) * ups


class LongcatFlashDecoderLayer(nn.Module):
    """Gives its experts what the first attention returns, and adds them at the very end.

    This "shortcut" lets a cluster move tokens between GPUs while the dense half continues.
    """

    def __init__(self, config: LongcatOmniConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.mlp = LongcatFlashMoE(config)
        self.self_attn = nn.ModuleList([LongcatFlashMLA(config) for _ in range(2)])
        self.mlps = nn.ModuleList([LongcatFlashMLP(config) for _ in range(2)])
        self.input_layernorm = nn.ModuleList([RMSNorm(size, eps) for _ in range(2)])
        self.post_attention_layernorm = nn.ModuleList([RMSNorm(size, eps) for _ in range(2)])

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        lengths: Sequence[int],
        caches: Sequence[LatentCache | None] = (None, None),
    ) -> Tensor:
        """Compute the layer: (T, H) -> (T, H)."""
        x = x + self.self_attn[0](self.input_layernorm[0](x), rotation, lengths, caches[0])
        normed = self.post_attention_layernorm[0](x)
        shortcut = self.mlp(normed)
        x = x + self.mlps[0](normed)
        x = x + self.self_attn[1](self.input_layernorm[1](x), rotation, lengths, caches[1])
        return x + self.mlps[1](self.post_attention_layernorm[1](x)) + shortcut


class LongcatFlashModel(nn.Module):
    def __init__(self, config: LongcatOmniConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [LongcatFlashDecoderLayer(config) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpoint_every = 0  # every n-th layer is computed again in the backward; 0: none

    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        lengths: Sequence[int],
        caches: Sequence[LatentCache] | None = None,
    ) -> Tensor:
        """Return hidden states (T, H) after the last norm.

        Args:
            embeds: (T, H), sequences one after the other.
            position_ids: (T,) places in each one's own sequence.
            lengths: of these sequences; their sum is T.
            caches: one for each of the 2 * num_layers attentions, where one sequence is continued.
        """
        rope: Any = self.config.rope_parameters
        rotation = compute_rotation(position_ids, self.config.qk_rope_head_dim, rope["rope_theta"])
        x = embeds
        for index, layer in enumerate(self.layers):
            if self.training and self.checkpoint_every and index % self.checkpoint_every == 0:
                x = checkpoint(layer, x, rotation, lengths, use_reentrant=False)
            elif caches is None:
                x = layer(x, rotation, lengths)
            else:
                x = layer(x, rotation, lengths, caches[2 * index : 2 * index + 2])
        return self.norm(x)
