"""What a dataset holds and whether training would fail on it; see `dinov2/run/check_data.py`, and --help."""

import sys

from dinov2.run.check_data import main

if __name__ == "__main__":
    sys.path = [*sys.path[1:], ""]  # the user's dataset classes lie in the current folder
    raise SystemExit(main())
