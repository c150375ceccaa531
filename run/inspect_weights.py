"""What a file of weights is and whether it fits a config; see `dinov2/run/inspect_weights.py`, and --help."""

from dinov2.run.inspect_weights import main

if __name__ == "__main__":
    raise SystemExit(main())
