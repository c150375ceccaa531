"""Scores of any protocol (leave one plate, slide or patient out); see `dinov2/eval/protocols.py`, and --help."""

import sys

from dinov2.eval.protocols import main
from dinov2.logging import end_program

if __name__ == "__main__":
    sys.path = [*sys.path[1:], ""]  # the user's dataset classes lie in the current folder
    end_program(main())
