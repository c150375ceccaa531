"""t-SNE scatter of features; see `dinov2/eval/tsne.py`, and --help for the options."""

import sys

from dinov2.eval.tsne import main
from dinov2.logging import end_program

if __name__ == "__main__":
    sys.path = [*sys.path[1:], ""]  # the user's dataset classes lie in the current folder
    end_program(main())
