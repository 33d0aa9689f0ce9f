"""JSON files and command lines -> values of the types that options have, or a message.

It knows no option itself: `types` maps the name of each to its type hint. Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Any, get_args, get_origin

if TYPE_CHECKING:
    from pathlib import Path


def read_json(path: Path) -> Any:
    """Return the contents of a file, or raise ValueError when it is missing or not JSON."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config file ({path.absolute()}).")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Fix the line it names.") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the contents of a file that holds one object, or raise ValueError."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__}, not an object of options.")
    return raw  # pyright: ignore[reportUnknownVariableType]


def parse_argv(argv: list[str], *, hint: str = "") -> dict[str, str]:
    """`--key value`, `--key=value` and bare `--flag` (true) as texts by key; the last one wins.

    Raises:
        ValueError: an argument that belongs to no key; `hint` ends the message.
    """
    texts: dict[str, str] = {}
    position = 0
    while position < len(argv):
        argument = argv[position]
        if not argument.startswith("--"):
            raise ValueError(
                f"the command line: {argument!r} has no key. Write --key value, for example "
                f"--seed 1{hint}."
            )
        key, has_equals, text = argument[2:].partition("=")
        position += 1
        if not has_equals:
            is_value = position < len(argv) and not argv[position].startswith("--")
            text = argv[position] if is_value else "true"
            position += is_value
        texts[key] = text
    return texts


def parse_text(key: str, text: str, types: dict[str, Any]) -> Any:
    """Return a command-line argument as the JSON value that the key's type asks for."""
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
    """Return the values of known keys, checked; keys that begin with "_" are comments."""
    return {
        key: check_value(key, value, types, source)
        for key, value in raw.items()
        if not key.startswith("_")
    }


def check_value(key: str, value: Any, types: dict[str, Any], source: str) -> Any:
    """Return `value` if `key` is known and takes its type; whole numbers are taken as floats.

    Raises:
        ValueError: an unknown key (the nearest known one is named), or another type.
    """
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
