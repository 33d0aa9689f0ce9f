"""Reads a HuBERT from a fairseq checkpoint (.pt): its settings, and its weights under new names.

`hubert.py` uses it for the released mHuBERT. fairseq itself is not needed, and no pickled code runs
(`restricted_pickle.py`).
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_omni.speech.restricted_pickle import load_foreign_checkpoint, to_plain

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import HubertConfig

CONV_LAYERS = "feature_extractor.conv_layers"
POS_CONV = "encoder.pos_conv.0"
DEFAULT_CONV_LAYERS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
# fairseq's names -> transformers'. The two spellings of weight norm differ in older transformers'
# files as well.
RENAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^hubert\.", ""),
        (rf"^({CONV_LAYERS}\.\d+)\.0\.", r"\1.conv."),
        (rf"^({CONV_LAYERS}\.\d+)\.2\.(1\.)?", r"\1.layer_norm."),
        (r"^layer_norm\.", "feature_projection.layer_norm."),
        (r"^post_extract_proj\.", "feature_projection.projection."),
        (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
        (r"\.conv\.weight_g$", ".conv.parametrizations.weight.original0"),
        (r"\.conv\.weight_v$", ".conv.parametrizations.weight.original1"),
        (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
        (r"^(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.layer_norm."),
        (r"^(encoder\.layers\.\d+)\.fc1\.", r"\1.feed_forward.intermediate_dense."),
        (r"^(encoder\.layers\.\d+)\.fc2\.", r"\1.feed_forward.output_dense."),
    )
]


@dataclass(frozen=True, eq=False)
class FairseqHubert:
    """Holds a checkpoint's HuBERT; `settings` are the model's, in fairseq's names."""

    source: Path
    state: dict[str, Tensor]  # fairseq's names
    settings: dict[str, Any]
    normalize: bool  # whether waveforms are to be normalized, a setting of the task


def read_fairseq_hubert(path: Path) -> FairseqHubert:
    """Reads the HuBERT in a fairseq checkpoint of any age.

    Raises:
        ValueError: not a checkpoint, something in it that is not plain data, or no HuBERT.
    """
    checkpoint = load_foreign_checkpoint(path)
    state = checkpoint.get("model")
    if not isinstance(state, dict) or not {"mask_emb", f"{POS_CONV}.weight_v"} <= state.keys():
        raise ValueError(
            f"{path}: no HuBERT of fairseq's (no mask_emb and {POS_CONV} among its weights). Give "
            "the checkpoint of a pretrained one, or a Hugging Face folder."
        )
    cfg = to_plain(checkpoint.get("cfg"))
    if not isinstance(cfg, dict) or "model" not in cfg:  # before fairseq 0.10: all in one namespace
        flat = to_plain(checkpoint.get("args"))
        cfg = {"model": flat, "task": flat}
    model, task = (cfg[key] if isinstance(cfg.get(key), dict) else {} for key in ("model", "task"))
    return FairseqHubert(path, state, model, bool(task.get("normalize", False)))


def build_config(hubert: FairseqHubert) -> HubertConfig:
    """Builds a HubertConfig: sizes from the weights' shapes, the rest from the settings.

    Raises:
        ValueError: an architecture that transformers' HubertModel has not.
    """
    from transformers import HubertConfig

    state, settings = hubert.state, hubert.settings
    if settings.get("layer_type", "transformer") != "transformer":
        raise ValueError(f"{hubert.source}: layer_type {settings['layer_type']} is not supported")
    convs = parse_conv_layers(str(settings.get("conv_feature_layers", DEFAULT_CONV_LAYERS)))
    names = [f"{CONV_LAYERS}.{number}.0.weight" for number in range(len(convs))]
    shapes = [(dim, kernel) for dim, kernel, _ in convs]
    if shapes != [(state[n].shape[0], state[n].shape[2]) if n in state else None for n in names]:
        raise ValueError(f"{hubert.source}: conv_feature_layers contradicts the weights: {convs}")
    width, per_group, pos_kernel = state[f"{POS_CONV}.weight_v"].shape
    has_layer_norms = f"{CONV_LAYERS}.1.2.1.weight" in state
    return HubertConfig(
        hidden_size=width,
        num_hidden_layers=sum(key.endswith(".fc1.weight") for key in state),
        num_attention_heads=int(settings.get("encoder_attention_heads") or width // 64),
        intermediate_size=state["encoder.layers.0.fc1.weight"].shape[0],
        hidden_act=str(settings.get("activation_fn", "gelu")),
        feat_extract_norm="layer" if has_layer_norms else "group",
        conv_dim=[dim for dim, _, _ in convs],
        conv_kernel=[kernel for _, kernel, _ in convs],
        conv_stride=[stride for _, _, stride in convs],
        conv_bias=f"{CONV_LAYERS}.0.0.bias" in state,
        num_conv_pos_embeddings=pos_kernel,
        num_conv_pos_embedding_groups=width // per_group,
        do_stable_layer_norm=bool(settings.get("layer_norm_first", has_layer_norms)),
    )


def rename_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames fairseq's (or an older transformers') weights as today's HubertModel has them."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, name in RENAMES:
            key = pattern.sub(name, key)
        renamed[key] = tensor
    return renamed


def parse_conv_layers(text: str) -> list[tuple[int, int, int]]:
    """Returns (channels, kernel, stride) of each convolution.

    fairseq stores Python source (see DEFAULT_CONV_LAYERS) and evaluates it; here numbers, tuples,
    lists, + and * are understood and nothing else.

    Raises:
        ValueError: anything else.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Tuple(elts=elements):
                return tuple(value(element) for element in elements)
            case ast.List(elts=elements):
                return [value(element) for element in elements]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(
                left=ast.List() as left, op=ast.Mult(), right=ast.Constant(value=int(n))
            ):
                return value(left) * min(n, 100)
        raise ValueError(ast.dump(node))

    try:
        layers = value(ast.parse(text, mode="eval").body)
        return [(int(dim), int(kernel), int(stride)) for dim, kernel, stride in layers]
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"conv_feature_layers {text!r} is not understood") from error
