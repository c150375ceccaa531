"""NSC and NSCB accuracy on BBBC021; see `dinov2/eval/bbbc021.py`, and --help for the options."""

import sys

from dinov2.eval.bbbc021 import main
from dinov2.logging import end_program

if __name__ == "__main__":
    sys.path = [*sys.path[1:], ""]  # the user's dataset classes lie in the current folder
    end_program(main())
