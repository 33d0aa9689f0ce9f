"""Tiny models and data for all tests of this folder, made once a session."""

from __future__ import annotations

import pytest

from tests.llama_omni.support.tiny import Tiny, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))
