"""Runs the data set's command `check`; all that it does is in check.py."""

from __future__ import annotations

import sys

from vss_longcat_omni.dataset.check import main

if __name__ == "__main__":
    sys.exit(main())
