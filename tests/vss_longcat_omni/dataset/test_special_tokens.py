"""Special tokens are read from a tokenizer, and the byte tokenizer has them where they belong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vss_longcat_omni.dataset.special_tokens import (
    EXTENDED_TOKENS,
    CodecIds,
    SpecialTokens,
    build_byte_tokenizer,
    name_mask_tokens,
    read_special_tokens,
)

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["The circle is red.", "The square is blue.", "two words \u00e9\u00e8 \u4f60\u597d\n\n 3.5"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer()


def test_byte_tokenizer_has_the_released_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = read_special_tokens(tokenizer)
    assert tokens == SpecialTokens()
    ids = [getattr(tokens, field) for field in EXTENDED_TOKENS]
    assert ids == list(range(134, 144))
    assert (tokens.bos, tokens.eos, tokens.pad, tokens.pause) == (1, 2, 3, 137)
    assert tokenizer.convert_ids_to_tokens([134, 143]) == ["<mask_110>", "<mask_119>"]
    assert tokens.codec == CodecIds(num_streams=4, offset=32, eos=2, pad=3)
    assert tokens.reserved == {1, 2, 3, *range(134, 144)}


def test_byte_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode())
        assert all(150 <= i < 406 for i in ids)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 406


def test_merges_shorten_known_text_and_leave_special_ids_alone() -> None:
    merged = build_byte_tokenizer(TEXTS * 3, vocab_size=430)
    assert len(merged) == 430
    assert read_special_tokens(merged) == SpecialTokens()
    for text in [*TEXTS, "unseen \u00fc"]:
        assert merged.decode(merged(text).input_ids) == text
    assert len(merged(TEXTS[0]).input_ids) < len(TEXTS[0])


def test_saved_byte_tokenizer_is_loaded_by_auto_tokenizer(tmp_path: Path) -> None:
    built = build_byte_tokenizer(TEXTS, vocab_size=420)
    built.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert read_special_tokens(loaded) == SpecialTokens()
    text = "<mask_110>The circle</longcat_s> \u00e9"
    for is_split in (False, True):
        ids = [t(text, split_special_tokens=is_split).input_ids for t in (built, loaded)]
        assert ids[0] == ids[1]
        assert (134 in ids[0]) is not is_split


def word_tokenizer(names: list[str], **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, names[0]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=names[0], **special)


ENDS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_official_names_serve_where_no_reserved_ones_are() -> None:
    names = ["<unk>", *ENDS.values(), *EXTENDED_TOKENS.values()]
    tokens = read_special_tokens(word_tokenizer(names, **ENDS))
    assert [getattr(tokens, field) for field in EXTENDED_TOKENS] == list(range(4, 14))


def test_missing_tokens_are_all_named() -> None:
    names = ["<unk>", "<s>", "</s>", *list(EXTENDED_TOKENS.values())[:-2]]
    tokenizer = word_tokenizer(names, bos_token="<s>", eos_token="</s>")
    with pytest.raises(
        ValueError, match=r"lacks pad_token, <\|image_pad\|> \(<mask_118>\), <image> "
    ):
        read_special_tokens(tokenizer)


def test_pad_that_is_also_eos_is_an_error() -> None:
    names = ["<unk>", *ENDS.values(), *EXTENDED_TOKENS.values()]
    tokenizer = word_tokenizer(names, **ENDS | {"pad_token": "</s>"})
    with pytest.raises(ValueError, match=r"one id.*pad_token"):
        read_special_tokens(tokenizer)


def test_mask_tokens_get_their_official_names() -> None:
    assert name_mask_tokens("a<mask_113>b<mask_110><mask_9>") == "a</pause>b<|audio|><mask_9>"
