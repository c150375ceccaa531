"""A contact sheet of what training makes of the images; see `dinov2/run/preview.py`, and --help for the options."""

import sys

from dinov2.run.preview import main

if __name__ == "__main__":
    sys.path = [*sys.path[1:], ""]  # the user's dataset classes lie in the current folder
    raise SystemExit(main())
