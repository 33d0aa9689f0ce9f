"""Writes random models in the released layout, for the demo, tests and rehearsals offline.

    python -m llama_omni.tools.make_model OUT --shape tiny
    python -m llama_omni.tools.make_model OUT --shape llama-3.1-8b --device cuda

OUT/llama (config, weights, tokenizer) and OUT/whisper (config, encoder weights, feature extractor)
are what `model_name_or_path` and `speech_encoder` of the configs take. `--shape llama-3.1-8b` has
the real sizes, so a rented machine can be tried out before 18 GB are fetched.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from llama_omni.dataset.prompt import AFTER_SPEECH, BEFORE_SPEECH, SYSTEM_PROMPT

if TYPE_CHECKING:
    from collections.abc import Iterable

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
# Llama 3's rule for cutting text into words before the byte pairs are merged.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "llama": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "initializer_range": 0.06,  # 0.02 suits 4096; at 128 it learns half as fast
        },
        "whisper": {
            "d_model": 128,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 512,
            "num_mel_bins": 80,
        },
    },
    "llama-3.1-8b": {
        "llama": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "vocab_size": 128256,
            "rope_parameters": LLAMA3_ROPE,
        },
        "whisper": {
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "num_mel_bins": 128,
        },
    },
}


def build_tokenizer(texts: Iterable[str] = (), vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Builds a byte-level BPE tokenizer with Llama 3's special tokens, merges learned from `texts`.

    `main` gives it the prompt alone: prompts are short then, and answers mostly a token a letter.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
    )


def make_llama(
    out: Path, tokenizer: PreTrainedTokenizerFast, *, shape: str, device: str = "cpu", seed: int = 0
) -> None:
    """Writes a random Llama of the given shape and its tokenizer to `out` in bf16."""
    vocabulary = tokenizer.get_vocab()
    sizes = {"vocab_size": len(tokenizer), **SHAPES[shape]["llama"]}
    config = LlamaConfig(
        **sizes,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=vocabulary["<|begin_of_text|>"],
        eos_token_id=vocabulary["<|eot_id|>"],
        pad_token_id=vocabulary["<|finetune_right_pad_id|>"],
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # pyright: ignore
    model.save_pretrained(out, max_shard_size="5GB")
    tokenizer.save_pretrained(out)


def make_whisper(out: Path, *, shape: str, device: str = "cpu", seed: int = 0) -> None:
    """Writes a random Whisper encoder and its feature extractor to `out` (transformers' layout)."""
    from safetensors.torch import save_file

    sizes = SHAPES[shape]["whisper"]
    config = WhisperConfig(**sizes)
    torch.manual_seed(seed)
    with torch.device(device):
        encoder = WhisperEncoder(config)
    weights = {
        f"model.encoder.{name}": tensor.half().cpu().contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    WhisperFeatureExtractor(feature_size=sizes["num_mel_bins"]).save_pretrained(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="write random models in the released layout")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--device", default="cpu", help="where the random weights are drawn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    tokenizer = build_tokenizer([SYSTEM_PROMPT + BEFORE_SPEECH + AFTER_SPEECH])
    make_llama(args.out / "llama", tokenizer, shape=args.shape, device=args.device, seed=args.seed)
    make_whisper(args.out / "whisper", shape=args.shape, device=args.device, seed=args.seed)
    sys.stdout.write(f"wrote {args.out / 'llama'} and {args.out / 'whisper'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
