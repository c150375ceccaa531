"""Print every setting with its default and comment, or write them to a file: `python -m dinov2.configs`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dinov2.configs.reference import reference_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dinov2.configs", description=__doc__)
    parser.add_argument("--output", type=Path, help="YAML file to write (default: print)")
    output = parser.parse_args(argv).output
    if output is None:
        sys.stdout.write(reference_yaml())
    else:
        output.write_text(reference_yaml(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
