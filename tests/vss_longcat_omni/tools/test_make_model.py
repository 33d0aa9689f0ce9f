"""make_model.py: sizes, weights as large as the released ones, a tokenizer of the transcripts."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoTokenizer

from vss_longcat_omni.dataset.folders import find_samples, read_transcript
from vss_longcat_omni.dataset.prepare import ContentDigests, transcript_path
from vss_longcat_omni.model.config import LongcatOmniConfig
from vss_longcat_omni.model.loading import load_config
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.tools.make_model import SIZES, init_std, make_model

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vss_longcat_omni.conftest import Ground


@pytest.mark.parametrize(("size", "least", "most"), [("tiny", 5e6, 7e6), ("small", 1e8, 3e8)])
def test_sizes(size: str, least: float, most: float) -> None:
    with torch.device("meta"):
        model = LongcatOmniForCausalLM(LongcatOmniConfig(vocab_size=400, **SIZES[size]))
    assert least < sum(param.numel() for param in model.parameters()) < most


def test_products_begin_as_large_as_at_the_released_width(ground: Ground) -> None:
    config, released = load_config(ground.model), LongcatOmniConfig()
    assert config.initializer_range == init_std(SIZES["tiny"])
    for sizes in (config, released):
        assert sizes.initializer_range**2 * sizes.hidden_size == pytest.approx(0.02**2 * 6144)


def test_what_transcribe_wrote_makes_the_tokenizer_too(ground: Ground, tmp_path: Path) -> None:
    """A word that was transcribed is one token, for samples without output.txt."""
    shutil.copytree(ground.data / "training", tmp_path / "data" / "training")
    digests = ContentDigests(tmp_path / "cache" / "digests.json")
    texts = {}
    for sample in find_samples(tmp_path / "data"):
        assert sample.transcript is not None
        path = transcript_path(digests.of(sample.output_audio), tmp_path / "cache")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(read_transcript(sample.transcript))
        texts[sample.name] = read_transcript(sample.transcript)
        sample.transcript.unlink()
    lengths = {}
    for name in ("cache", "no_cache"):
        make_model(
            tmp_path / name / "model",
            size="tiny",
            data_dir=tmp_path / "data",
            cache_dir=tmp_path / name,
        )
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name / "model")
        lengths[name] = [len(tokenizer(text).input_ids) for text in texts.values()]
    assert max(lengths["cache"]) <= 4
    assert lengths["no_cache"] == [len(text) for text in texts.values()]
