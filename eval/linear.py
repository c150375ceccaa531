"""Linear classifiers on frozen features; see `dinov2/eval/linear.py`, and --help for the options."""

import sys

from dinov2.eval.linear import main
from dinov2.logging import end_program

if __name__ == "__main__":
    sys.path = [*sys.path[1:], ""]  # the user's dataset classes lie in the current folder
    end_program(main())
