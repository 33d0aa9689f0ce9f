"""The command of the data set: `check` opens every file and says what is wrong in which folder.

    python -m vss_longcat_omni.dataset check data [--split training] [--tokenizer FOLDER]

Beside the data flow; all that it does is in check.py.
"""

from __future__ import annotations

import sys

from vss_longcat_omni.dataset.check import main

if __name__ == "__main__":
    sys.exit(main())
