"""Run any program as a job on a Slurm cluster or on this machine; see `dinov2/run/submit.py`, and --help."""

from dinov2.run.submit import main

if __name__ == "__main__":
    raise SystemExit(main())
