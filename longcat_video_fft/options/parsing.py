"""JSON files and command lines -> values of the types that options have, or a message.

Called by `load.py` with the types of the options; knows none of them by itself.
"""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Any, get_args, get_origin

if TYPE_CHECKING:
    from pathlib import Path


def read_json(path: Path) -> Any:
    """Raises ValueError when there is no such file or it is not JSON."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config file ({path.absolute()}).")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Mend the line it names.") from None


def read_json_object(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__}, not an object of options.")
    return raw  # pyright: ignore[reportUnknownVariableType]


def parse_words(argv: list[str]) -> dict[str, str]:
    """`--key value`, `--key=value` and bare `--flag` (true) as texts by key."""
    words: dict[str, str] = {}
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--"):
            raise ValueError(
                f"the command line: {word!r} has no key. Write --key value, for example --seed 1."
            )
        key, has_equals, text = word[2:].partition("=")
        position += 1
        if not has_equals:
            is_value = position < len(argv) and not argv[position].startswith("--")
            text = argv[position] if is_value else "true"
            position += is_value
        words[key] = text
    return words


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


def check_values(raw: dict[str, Any], types: dict[str, Any], source: str) -> dict[str, Any]:
    """The values of known keys with the right types; keys that begin with "_" are left out."""
    return {
        key: check_value(key, value, types, source)
        for key, value in raw.items()
        if not key.startswith("_")
    }


def check_value(key: str, value: Any, types: dict[str, Any], source: str) -> Any:
    """`value` when `key` is known and takes its type; whole numbers are taken as floats."""
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else " README.md lists the known keys."
        raise ValueError(f"{source}: unknown key {key!r}.{hint}")
    hint = types[key]
    allowed = (hint,) if get_origin(hint) in (list, dict) else get_args(hint) or (hint,)
    kinds = tuple(get_origin(kind) or kind for kind in allowed)
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    shown = key if "access_key" in key else f"{key}={value!r}"  # a secret is not repeated
    raise ValueError(f"{source}: {shown} must be of type {names}.")
