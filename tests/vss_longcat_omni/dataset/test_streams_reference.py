"""Our token streams equal the official ones' recorded results, and a difference is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tests.vss_longcat_omni.support.streams_reference import (
    compare_embed,
    compare_interleave,
    compare_post,
    compare_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Compare = Callable[[Path], Iterator[tuple[str, float]]]

REFERENCE = Path(__file__).parents[2] / "reference"
FAMILIES = {
    "longcat_omni_rows.json": (compare_rows, 52),
    "longcat_omni_interleave.json": (compare_interleave, 177),
    "longcat_omni_post.json": (compare_post, 21),
    "longcat_omni_embed.cases.safetensors": (compare_embed, 2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_entry_of_the_official_results_is_met(name: str) -> None:
    compare, num_cases = FAMILIES[name]
    found = dict(compare(REFERENCE / name))
    assert len(found) == num_cases
    assert {case: error for case, error in found.items() if not error <= 1e-5} == {}


def write_changed(path: Path, name: str, keys: list[str | int], value: Any) -> Path:
    """A copy of a JSON reference file with the entry at `keys` replaced."""
    data = json.loads((REFERENCE / name).read_text())
    entry = data
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    path.write_text(json.dumps(data))
    return path


CHANGES: list[tuple[Compare, str, list[str | int], Any]] = [
    (compare_rows, "rows", ["conversions", 0, "audio_streams", 1, 0], 4),
    (compare_rows, "rows", ["conversions", 2, "text_stream", 3], 2),
    (compare_rows, "rows", ["conversations", 0, "role_ids", 6], 1),
    (compare_rows, "rows", ["conversations", 3, "multi_codec_ids", 0, 0], 4),
    (compare_rows, "rows", ["too_long_fallback", "assistant_mask", 0, 0], 1),
    (compare_rows, "rows", ["config", "codec_offset"], 33),
    (compare_interleave, "interleave", ["interleaved_sampling", 0, "frame_indices", 1], 17),
    (compare_interleave, "interleave", ["video_sampling", 0, "timestamps", 1], "second{0.6}:"),
    (compare_interleave, "interleave", ["plans", 0, "segments", 3, 1], 13),
    (compare_interleave, "interleave", ["plans", 0, "total_tokens"], 101),
    (compare_post, "post", ["audio", 0, "unshifted", 0, 1], 1521),
    (compare_post, "post", ["text", 0, "cleaned"], "Hello.World"),
    (compare_post, "post", ["text_from_ids", 1, "text"], "a b."),
]


@pytest.mark.parametrize(("compare", "family", "keys", "value"), CHANGES)
def test_one_changed_entry_is_a_mismatch(
    tmp_path: Path, compare: Compare, family: str, keys: list[str | int], value: Any
) -> None:
    path = write_changed(tmp_path / "changed.json", f"longcat_omni_{family}.json", keys, value)
    assert [error for _, error in compare(path) if error > 1e-5]


def test_an_entry_that_nothing_compares_is_an_error(tmp_path: Path) -> None:
    path = write_changed(tmp_path / "a.json", "longcat_omni_post.json", ["video"], [])
    with pytest.raises(ValueError, match=r"nothing compares.*video"):
        list(compare_post(path))
    keys: list[str | int] = ["config", "add_round_idx"]
    path = write_changed(tmp_path / "b.json", "longcat_omni_rows.json", keys, True)
    with pytest.raises(ValueError, match="add_round_idx=True"):
        list(compare_rows(path))


def test_a_changed_embedding_is_a_mismatch_and_an_added_one_an_error(tmp_path: Path) -> None:
    with safe_open(REFERENCE / "longcat_omni_embed.cases.safetensors", "pt") as file:
        cases = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    path = tmp_path / "longcat_omni_embed.cases.safetensors"
    cases["merged"][3, 0] += 0.01
    save_file(cases, path, metadata)
    found = dict(compare_embed(path))
    assert found["merged"] > 1e-5 >= found["merged_without_media"]
    save_file(cases | {"merged_backwards": cases["merged"].clone()}, path, metadata)
    with pytest.raises(ValueError, match="merged_backwards"):
        list(compare_embed(path))
