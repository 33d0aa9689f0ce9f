"""Made samples and a tiny model, once for all tests that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from data.make_vss import make_vss
from vss_longcat_omni.tools.make_model import make_model

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Ground:
    """Holds where a run finds what it needs."""

    data: Path
    model: Path
    cache: Path

    def argv(self, out: Path, **options: object) -> list[str]:
        """Return flags of a short run; `options` on top."""
        values: dict[str, object] = {
            "model_name_or_path": self.model,
            "data_dir": self.data,
            "cache_dir": self.cache,
            "output_dir": out,
            "max_tokens": 400,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 3,
            "lora_r": 4,
            "lora_alpha": 8,
            "learning_rate": 0.01,
            "dataloader_num_workers": 0,
            "use_cpu": True,
            "report_to": "none",
        }
        values |= options
        return [arg for name, value in values.items() for arg in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    root = tmp_path_factory.mktemp("vss")
    make_vss(root / "data" / "training", count=12, seed=0)
    make_vss(root / "data" / "test", count=3, seed=1, split="test")
    make_model(root / "model", size="tiny", data_dir=root / "data")
    return Ground(data=root / "data", model=root / "model", cache=root / "cache")
