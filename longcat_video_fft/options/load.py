"""Reads and checks training_config.json and databackend*.json: what a command calls first.

    argv of the command line  -> `parsing.py` -> TrainConfig, checked by `config_rules.py`
    data_backend_config       -> `parsing.py` -> DataConfig, checked by `data_rules.py`

Nothing heavy is imported: a mistake is reported within the first second, before any model loads.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, get_type_hints

from longcat_video_fft.options.buckets import DEFAULT_FRAMES, MAX_FRAMES, SHAPES_480P, BucketRule
from longcat_video_fft.options.config import TYPES, TrainConfig
from longcat_video_fft.options.config_rules import validate_config
from longcat_video_fft.options.data_config import (
    DataConfig,
    ParquetOptions,
    TextEmbeds,
    VideoData,
    VideoOptions,
)
from longcat_video_fft.options.data_rules import (
    UNSUPPORTED,
    check_caches,
    check_frames,
    check_picture,
    check_placeholders,
    check_source,
    find_placeholders,
)
from longcat_video_fft.options.parsing import (
    check_values,
    parse_argv,
    parse_text,
    read_json,
    read_json_object,
)

logger = logging.getLogger(__name__)

# The source document's older names, by today's.
OLDER_NAMES = {
    "validation_step_interval": "validation_every_n_steps",
    "num_validation_images": "num_validation_videos",
}


def read_configs(argv: list[str], *, plans: bool = False) -> tuple[TrainConfig, DataConfig]:
    """Reads the two files and the command line. `plans`: with dry_run set, placeholders may be
    left.

    Raises:
        ValueError: what is wrong, with the file and the field.
    """
    config = load_config(argv)
    path = config.folder / Path(str(config.data_backend_config)).expanduser()
    return config, load_data_config(path, allows_placeholders=plans and config.dry_run)


def load_config(argv: list[str]) -> TrainConfig:
    """Reads `--config FILE [--key value | --key=value ...]`; later values win.

    Raises:
        ValueError: unreadable file, unknown key (the nearest known one is named), wrong type, or a
            value that cannot work.
    """
    texts = parse_argv(argv)
    values: dict[str, Any] = {}
    source = texts.pop("config", None) or "the command line"
    if source != "the command line":
        values = check_values(rename_older(read_json_object(Path(source)), source), TYPES, source)
    texts = rename_older(texts, "the command line")
    given = {key: parse_text(key, text, TYPES) for key, text in texts.items()}
    values.update(check_values(given, TYPES, "the command line"))
    config = TrainConfig(**values, source=source)
    validate_config(config)
    return config


def rename_older(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns `raw` with today's names. Raises ValueError when both are there, with two values."""
    raw = dict(raw)
    for name, older in OLDER_NAMES.items():
        if older in raw:
            value = raw.pop(older)
            if raw.setdefault(name, value) != value:
                raise ValueError(
                    f"{source}: {older} is {name} by its older name, and they have two values, "
                    f"{value!r} and {raw[name]!r}; delete one."
                )
    return raw


def load_data_config(path: Path, *, allows_placeholders: bool = False) -> DataConfig:
    """Reads and checks a databackend file.

    Args:
        allows_placeholders: fields that still hold a placeholder are named in the result.

    Raises:
        ValueError: what is wrong, with the file and the field.
    """
    raw = read_json(path)
    if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
        raise ValueError(f"{path}: must be a list of objects, as databackend.json is.")
    videos = VideoData(**_read(_pick(raw, "video", path), VideoData, str(path)))
    text = TextEmbeds(**_read(_pick(raw, "text_embeds", path), TextEmbeds, str(path)))
    options = VideoOptions(**_read(videos.video, VideoOptions, f"{path}: video"))
    parquet = ParquetOptions(**_read(videos.parquet, ParquetOptions, f"{path}: parquet"))
    for problem in (
        *check_source(videos, parquet),
        *check_picture(videos),
        *check_frames(options),
        *check_caches(videos, text),
        *([] if allows_placeholders else check_placeholders(videos)),
    ):
        raise ValueError(f"{path}: {problem}")
    if videos.aws_secret_access_key or videos.aws_access_key_id:
        logger.warning(
            "%s holds an AWS key. Whoever reads the file has it: export AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY instead, which win over the file.",
            path,
        )
    rule, placeholders = _build_rule(videos, options), tuple(find_placeholders(videos))
    return DataConfig(path, videos, options, parquet, text, rule, placeholders)


def _pick(raw: list[dict[str, Any]], kind: str, path: Path) -> dict[str, Any]:
    found = [item for item in raw if item.get("dataset_type") == kind]
    others = {str(item.get("dataset_type")) for item in raw} - {"video", "text_embeds"}
    if others:
        raise ValueError(
            f"{path}: dataset_type {', '.join(sorted(others))} is not known here; there are one "
            '"video" and one "text_embeds".'
        )
    if len(found) != 1:
        raise ValueError(
            f'{path}: has {len(found)} objects with dataset_type "{kind}" and needs one. Videos of '
            "several sources go below one prefix or folder."
        )
    return found[0]


def _read(raw: dict[str, Any], kind: type, source: str) -> dict[str, Any]:
    for key in raw:
        if key in UNSUPPORTED:
            raise ValueError(f"{source}: {key} is not supported: {UNSUPPORTED[key]}.")
    raw = dict(raw)
    if raw.pop("disable_multiline_split", True) is not True:  # true is what is done anyway
        raise ValueError(
            f"{source}: disable_multiline_split=false is not supported: a caption of several lines "
            "is one caption; delete the line."
        )
    types = get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    return check_values(raw, {key: types[key] for key in names}, source)


def _build_rule(v: VideoData, o: VideoOptions) -> BucketRule:
    shapes = SHAPES_480P
    if isinstance(v.resolution, list):
        shapes = {height / width: (height, width) for height, width in v.resolution}
    frames = o.frame_buckets or (DEFAULT_FRAMES if o.num_frames == MAX_FRAMES else [o.num_frames])
    return BucketRule(
        shapes=tuple(shapes.items()),
        frames=tuple(sorted(set(frames), reverse=True)),
        target_fps=None if o.target_fps == "native" else float(o.target_fps),
        crop=v.crop,
    )
