"""k-NN accuracy of a frozen backbone; see `dinov2/eval/knn.py`, and --help for the options."""

import sys

from dinov2.eval.knn import main

if __name__ == "__main__":
    sys.path[0] = ""  # the user's dataset classes lie in the current folder
    raise SystemExit(main())
