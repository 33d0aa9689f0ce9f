"""Options as text -> checked values: a JSON file, and `--key value` words over it.

First in the data flow, under config.py. It knows no option itself: `types` maps the name of each to
its type hint. Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pathlib import Path


def read_config_file(path: Path, types: dict[str, Any]) -> dict[str, Any]:
    """The checked contents of a JSON config file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config file. Start from configs/stage1_config.json.")
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Mend the line it names.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__}, not an object of options.")
    values: dict[str, Any] = dict(raw)  # pyright: ignore
    return {key: check_value(key, value, types, str(path)) for key, value in values.items()}


def parse_overrides(args: list[str], types: dict[str, Any]) -> dict[str, Any]:
    """`--key value`, `--key=value` and bare `--flag` (true) as checked values."""
    values: dict[str, Any] = {}
    position = 0
    while position < len(args):
        word = args[position]
        if not word.startswith("--"):
            raise ValueError(
                f"the command line: {word!r} has no key. Write --key value, for example "
                "--learning_rate 1e-5; only the first word may be a config file."
            )
        key, has_equals, text = word[2:].partition("=")
        position += 1
        if not has_equals:
            is_value = position < len(args) and not args[position].startswith("--")
            text = args[position] if is_value else "true"
            position += is_value
        if key in ("local_rank", "local-rank"):  # added by the deepspeed launcher; ranks come
            continue  # from the environment
        values[key] = check_value(key, parse_text(key, text, types), types, "the command line")
    return values


def parse_text(key: str, text: str, types: dict[str, Any]) -> Any:
    """A command-line word as the JSON value that the key's type asks for."""
    allowed = get_args(types.get(key, str)) or (types.get(key, str),)
    if text.lower() in ("null", "none") and type(None) in allowed:
        return None
    if bool in allowed:
        return {"true": True, "false": False}.get(text.lower(), text)
    for number in (int, float):
        if number in allowed:
            try:
                return number(text)
            except ValueError:
                continue
    return text


def check_value(key: str, value: Any, types: dict[str, Any], source: str) -> Any:
    """`value` when `key` is known and takes its type; whole numbers are taken as floats."""
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else " README.md lists the known keys."
        raise ValueError(f"{source}: unknown key {key!r}.{hint}")
    allowed = get_args(types[key]) or (types[key],)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
        raise ValueError(f"{source}: {key}={value!r} must be of type {names}.")
    return value
