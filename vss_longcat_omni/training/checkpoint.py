"""Finds the checkpoint that a run is resumed from; the Trainer writes and reads them.

train_ds.py calls it before the model is built, so that a missing one is reported early.
"""

from __future__ import annotations

from pathlib import Path


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """Return the checkpoint named, or with "latest" the last whole one of the run.

    Raises:
        ValueError: there is none. trainer_state.json is written last, so a folder without it was
            cut off.
    """
    if wanted != "latest":
        path = Path(wanted)
        if not (path / "trainer_state.json").is_file():
            raise ValueError(f"resume_from_checkpoint: {path} is no whole checkpoint of a run.")
        return path
    found = [p.parent for p in output_dir.glob("checkpoint-*/trainer_state.json")]
    numbered = [p for p in found if p.name.removeprefix("checkpoint-").isdigit()]
    if not numbered:
        raise ValueError(f"resume_from_checkpoint=latest: {output_dir} holds no whole checkpoint.")
    return max(numbered, key=lambda p: int(p.name.removeprefix("checkpoint-")))
