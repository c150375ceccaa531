"""Write a backbone for other programs; see `dinov2/run/export.py`, and --help for the options."""

from dinov2.run.export import main

if __name__ == "__main__":
    raise SystemExit(main())
