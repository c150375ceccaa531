"""In the script of a Slurm job, after srun has ended: is the job done, does it start again, or is it requeued?

    python -m dinov2.run.submit_after FOLDER CODE

FOLDER holds submitit's files, CODE is srun's exit code. It ends with 75 if srun is to be started again, in the nodes
and the time that the job still has; else with the exit code of the job. It runs in the script, because that outlives
every rank, however it ends; when the first node itself dies, Slurm requeues the job.
"""

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import submitit

from dinov2.run.submit_attempts import REQUEUED, RESTARTED, STOPPED, Attempt, Record, Verdict, judge, progress_of
from dinov2.run.submit_job import RESTARTS, ProgramJob, RankEnd
from dinov2.run.submit_local import log_of

AGAIN = 75  # EX_TEMPFAIL of sysexits.h
_ASK_S = 60  # for an answer of Slurm
_LIMIT_CHECK_S = 60  # Slurm looks at time limits every 30 s, and warns that much ahead


def main(argv: Sequence[str] | None = None) -> int:
    """Decide, write it down, and requeue the job if that is due; returns the exit code described above."""
    parser = argparse.ArgumentParser(prog="submit_after", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("code", type=int)
    args = parser.parse_args(argv)
    env = submitit.JobEnvironment()
    paths = submitit.core.utils.JobPaths(args.folder, job_id=env.job_id, task_id=0)
    job = submitit.core.utils.DelayedSubmission.load(paths.submitted_pickle).function
    record = Record.open(args.folder, env.job_id)
    attempt, verdict = conclude(job, record, folder=args.folder, job_id=env.job_id, code=args.code)
    if verdict.kind == REQUEUED or (verdict.kind == RESTARTED and attempt.at_time_limit):
        return _requeue(record, env.job_id)
    return AGAIN if verdict.kind == RESTARTED else verdict.code


def conclude(job: ProgramJob, record: Record, *, folder: Path, job_id: str, code: int) -> tuple[Attempt, Verdict]:
    """Write down the attempt that has just ended, and say what follows."""
    slurm = _SlurmView.ask(job_id)
    ends = _collect_ends(folder, job_id)
    progress = progress_of(job.run_folder(job_id))
    attempt = Attempt(number=len(record.attempts) + 1, ended=time.time(), code=code, progress=progress)
    failed = min((end for end in ends if end.code), key=lambda end: end.ended, default=None)
    if failed is not None:
        attempt = replace(attempt, code=failed.code, rank=failed.rank, host=failed.host)
    stopped_by = next((end.stopped_by for end in ends if end.stopped_by is not None), None)
    was_warned = stopped_by is not None and slurm.left_s < job.signal_delay_s + _LIMIT_CHECK_S
    attempt = replace(
        attempt,
        stopped_by=stopped_by,
        at_time_limit=was_warned or slurm.is_over_time,
        was_preempted=slurm.is_preempted,
    )
    log = str(log_of(folder, job_id, attempt.rank or 0))
    verdict = judge([*record.attempts, attempt], job.limits, is_cancelled=slurm.is_cancelled, log=log)
    record.add(attempt, verdict)
    print(f"job {job_id}, attempt {attempt.number}: {verdict.reason}", flush=True)
    return attempt, verdict


def _requeue(record: Record, job_id: str) -> int:
    """Put the job back into the queue, which ends it here; it has ended for good if Slurm refuses."""
    result = _scontrol("requeue", job_id)
    if result.returncode == 0 or record.attempts[-1].was_preempted:  # then Slurm may do it by itself
        return 0
    reason = " ".join(result.stderr.split()) or "no reason given"
    sentence = f"Slurm does not requeue job {job_id} ({reason}); submit again to go on"
    record.end = {"kind": STOPPED, "code": 1, "reason": sentence}
    record.write()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 1


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=f"no answer in {_ASK_S} s")


def _collect_ends(folder: Path, job_id: str) -> list[RankEnd]:
    """Read and remove what the ranks have left."""
    ends = []
    for path in folder.glob(str(RankEnd.path(Path(), job_id, "*"))):
        try:
            end = RankEnd(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # cut off by a kill
            continue
        finally:
            path.unlink(missing_ok=True)
        if end.restarts == os.environ.get(RESTARTS, "0"):
            ends.append(end)
    return ends


@dataclass(frozen=True, kw_only=True)
class _SlurmView:
    """What Slurm says about a job that runs or has just been ended."""

    is_cancelled: bool
    is_preempted: bool  # it has been told to give way, or has been made to
    is_over_time: bool  # ended at its time limit, because it had not ended when it was told to
    left_s: float  # before the time limit; infinite where the end has another cause or is not known

    @classmethod
    def ask(cls, job_id: str) -> "_SlurmView":
        result = _scontrol("show", "job", "--oneliner", job_id)
        facts = dict(re.findall(r"(\w+)=(\S*)", result.stdout))
        is_running = facts.get("JobState", "RUNNING") == "RUNNING"
        is_over_time = not is_running and facts.get("Reason") == "TimeLimit"
        preempted = facts.get("PreemptTime", "None")
        is_preempted = preempted != "None" and preempted >= facts.get("StartTime", "")  # in this attempt
        is_cancelled = not (is_running or is_over_time or is_preempted)
        left_s = math.inf
        if is_running and not is_preempted:
            with contextlib.suppress(KeyError, ValueError):
                left_s = (datetime.fromisoformat(facts["EndTime"]) - datetime.now()).total_seconds()
        return cls(is_cancelled=is_cancelled, is_preempted=is_preempted, is_over_time=is_over_time, left_s=left_s)


if __name__ == "__main__":
    raise SystemExit(main())
