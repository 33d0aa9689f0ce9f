"""Holds the sizes of the whole model: LongCat-Flash's keys, the audio tables, the two encoders.

The released folder keeps them in three files (config.json, vision/config.json, audio/config.json);
`loading.py` reads these into one `LongcatOmniConfig`.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LongcatFlashConfig


class LongcatOmniConfig(LongcatFlashConfig):
    """Has LongcatFlashConfig's keys and defaults (the released 560B), and these.

    `model_type` is one of its own: for "longcat_flash" peft rewrites gate_proj, up_proj and
    down_proj into the experts' fused tensors (peft 0.21.2, `_convert_peft_config_moe`), so that the
    dense MLPs would get no adapter and 13 billion parameters of experts would.

    Attributes:
        audio_vocab_size: rows of each audio table; 32 reserved ids, then 8,192 codes.
        audio_head_num: streams of codes in parallel with the text: one semantic, three acoustic.
        vision_config, audio_config: keys of `VisionConfig` and `AudioEncoderConfig`; None: the
            model has no vision encoder, or no audio encoder.
    """

    model_type = "longcat_flash_omni"

    pad_token_id: int | None = 3
    audio_vocab_size: int = 8224
    audio_head_num: int = 4
    vision_config: dict[str, Any] | None = None
    audio_config: dict[str, Any] | None = None


AutoConfig.register(LongcatOmniConfig.model_type, LongcatOmniConfig, exist_ok=True)
