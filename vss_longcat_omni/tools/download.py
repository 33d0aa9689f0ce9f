"""Downloads a model ahead of a run, once a node, into the cache that the run looks in.

    python -m vss_longcat_omni.tools.download org/name --allow "*.json" --allow "model*"

`options/hub.py` has the syntax of a hub id.
"""

from __future__ import annotations

import argparse
import logging
import sys

from vss_longcat_omni.options.hub import resolve_artifact


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("spec", help="org/name, org/name@revision, org/name:file, or a path")
    parser.add_argument("--allow", action="append", default=[], help="pattern of the files wanted")
    parser.add_argument("--sha256", help="expected digest, for a single file")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vss_longcat_omni.options.hub").setLevel(logging.INFO)
    try:
        path = resolve_artifact(
            args.spec, field="spec", allow_patterns=tuple(args.allow), sha256=args.sha256
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
