"""List, verify, inspect, consolidate, reshard and compare checkpoints; see `dinov2/run/checkpoint.py`, and --help."""

from dinov2.run.checkpoint import main

if __name__ == "__main__":
    raise SystemExit(main())
