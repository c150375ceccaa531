"""Run dinov2/train/train.py as a job on a Slurm cluster or on this machine; see `dinov2/run/submit.py`, and --help."""

from dinov2.run.submit import main
from dinov2.run.submit_options import TRAIN_PROGRAM

if __name__ == "__main__":
    raise SystemExit(main(program=TRAIN_PROGRAM))
