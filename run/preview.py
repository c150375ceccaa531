"""A contact sheet of what training makes of the images; see `dinov2/run/preview.py`, and --help for the options."""

from dinov2.run.preview import main

if __name__ == "__main__":
    raise SystemExit(main())
