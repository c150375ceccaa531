"""What a dataset holds and whether training would fail on it; see `dinov2/run/check_data.py`, and --help."""

from dinov2.run.check_data import main

if __name__ == "__main__":
    raise SystemExit(main())
