"""A training that tests launch, catch in the middle and compare with one that nothing happened to."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dinov2.checkpoint_format import checkpoint_name, find_checkpoints
from dinov2.run.status_runs import RunStatus, read_status
from support.slurm_cluster import wait_until
from support.training import TINY_RUN, assert_same_state, metrics_of, values_but_timing

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "run" / "train" / "train.py"
STEPS = 60
LAST = checkpoint_name(STEPS - 1)
CAUGHT_AFTER = 7  # steps: after the first checkpoint
PATIENCE_S = 600  # for what takes half a minute on a machine that has nothing else to do
_BATCH_SIZE = 4
_SETTINGS = (
    *TINY_RUN,
    f"train.OFFICIAL_EPOCH_LENGTH={STEPS}",
    "train.dataset_path=support.slow_digits.SlowDigits:split=TRAIN:slow={slow}",
    "checkpointing.period=5",
    f"train.batch_size_per_gpu={_BATCH_SIZE}",
    "guard_rails.action=off",
    "checkpointing.max_to_keep=2",
)


@dataclass(frozen=True)
class LaunchedRun:
    """A run of two processes in a folder of its own; `log_dir` holds what the launcher writes."""

    folder: Path

    @property
    def log_dir(self) -> Path:
        return self.folder / "jobs"

    @property
    def _slow(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.slow")

    def arguments(self) -> list[str]:
        """Return what the launcher passes on to the program."""
        return [setting.format(slow=self._slow) for setting in _SETTINGS]

    def slow_down(self, step_s: float = 1.0) -> "LaunchedRun":
        """Let its images come so slowly that a step takes so long, until `hurry`."""
        self._slow.write_text(str(step_s / _BATCH_SIZE))
        return self

    def hurry(self) -> None:
        self._slow.unlink()

    def status(self) -> RunStatus:
        return read_status(self.folder)

    def catch(self) -> None:
        """Wait until it is in the middle, with a checkpoint behind it."""

        def is_there() -> bool:
            step = self.status().step
            return step is not None and step >= CAUGHT_AFTER and bool(find_checkpoints(self.folder))

        self.wait_until(is_there, what=f"step {CAUGHT_AFTER}")
        assert self.status().step < STEPS

    def wait_until(self, holds: Callable[[], bool], *, what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait for something to become true; the error shows the logs of the job."""
        wait_until(holds, what=f"{self.folder.name}: {what}", timeout_s=timeout_s, logs=self.log_dir)

    def was_stopped_in_the_middle(self) -> bool:
        """Say whether an attempt has ended after some steps, not only while it was starting."""
        return any(attempt["progress"]["step"] for attempt in self.attempts())

    def attempts(self) -> list[dict[str, object]]:
        """Return the launcher's record of how often the program was started, and how each start ended."""
        for path in self.log_dir.glob("*_attempts.json"):
            with contextlib.suppress(FileNotFoundError):
                return json.loads(path.read_text())["attempts"]
        return []

    def assert_same_as(self, other: "LaunchedRun") -> None:
        """Compare all that the two have computed, bit for bit."""
        assert_same_state(self.folder, other.folder, name=LAST, num_ranks=2)
        rows = metrics_of(self.folder)
        assert [row["iteration"] for row in rows] == list(range(STEPS))
        assert values_but_timing(rows) == values_but_timing(metrics_of(other.folder))
        assert self.status().state == "finished"
