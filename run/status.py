"""Show how the runs below some folders are doing, as a table; see `dinov2/run/status.py`, and --help."""

from dinov2.run.status import main

if __name__ == "__main__":
    raise SystemExit(main())
