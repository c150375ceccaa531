"""Run eval/linear.py as a job on a Slurm cluster or on this machine; see `dinov2/run/submit.py`, and --help."""

from pathlib import Path

from dinov2.run.submit import main

if __name__ == "__main__":
    raise SystemExit(main(program=Path(__file__).resolve().parents[2] / "eval" / "linear.py"))
