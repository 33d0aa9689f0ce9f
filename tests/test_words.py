"""Words that readers of the field stumbled over do not come back; codespell holds the spelling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_repository import TEXTS

LEFT = re.compile(
    r"\bstand(s|ing)? still|\bstood still|\blook_and_listen\b|\bconverse\b|complaint|\banew\b"
    r"|\bmend(s|ed|ing)?\b|\blearned by heart|\bappears? whole|\bwhole or not at all"
    r"|\bturned by halves|\bfree.blocks?\b|\bgone on from|\bwaits in host memory"
    r"|\bmoments? of memory|recognis|\bprogramme|\bjudges?\b|\b(her|its|the) (eyes|ears)\b",
    re.IGNORECASE,
)
FOLDERS = ("llama_omni/", "longcat_video_fft/", "vss_longcat_omni/", "tests/", "data/")
# What others said or made, and the names that this repository had before.
QUOTED = ("tests/reference/", "tests/test_words.py", "data/facts.py", "CONTRIBUTING.md")
PATHS = [path for path in TEXTS if path.endswith((".py", ".sh", ".sbatch", ".md", ".json"))]


def find_left_words(text: str) -> list[str]:
    return [match[0] for match in LEFT.finditer(text)]


@pytest.mark.parametrize("folder", [*FOLDERS, ""])
def test_left_words_do_not_come_back(folder: str) -> None:
    """The root's own files are those of the empty folder."""
    found = {
        path: words
        for path in PATHS
        if (path.startswith(folder) if folder else "/" not in path) and not path.startswith(QUOTED)
        if (words := find_left_words(Path(path).name + "\n" + TEXTS[path]))
    }
    assert found == {}


def test_a_left_word_is_found() -> None:
    text = "The encoder stands still; its eyes are mended anew, and the judge complaints."
    assert len(find_left_words(text)) == 6
