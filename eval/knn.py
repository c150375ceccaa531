"""k-NN accuracy of a frozen backbone; see `dinov2/eval/knn.py`, and --help for the options."""

from dinov2.eval.knn import main

if __name__ == "__main__":
    raise SystemExit(main())
