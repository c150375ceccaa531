"""What a run will cost before it starts; see `dinov2/run/estimate.py`, and --help."""

import sys

from dinov2.run.estimate import main

if __name__ == "__main__":
    sys.path = [*sys.path[1:], ""]  # the user's dataset classes lie in the current folder
    raise SystemExit(main())
