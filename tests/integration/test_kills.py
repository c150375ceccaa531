"""A run of two processes is killed at random instants, many of them inside saving, and ends as if nothing had happened.

One process has imported everything and forks the two ranks for every start, so that a start costs about a second. It
learns of every change in the folder of the run when it happens, and kills then, or a few milliseconds later.
"""

import contextlib
import importlib
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from support.dist import run_alone
from support.folder_events import FolderEvents
from support.fork_server import ForkedRanks
from support.training import TINY_RUN, assert_same_state, metrics_of, values_but_timing

from dinov2.checkpoint_format import checkpoint_name, find_checkpoints, has_manifest, iteration_of
from dinov2.train.train import main

SEED, KILLS = 5, 200
STEPS, KEPT = 36, 2
LAST = checkpoint_name(STEPS - 1)
# A rank whose neighbour was killed ends by itself, once the other's workers have let go of its connections; one that
# waits to meet a rank killed before that, waits on: a launcher ends it, and so does the test after this time.
ENDS_WITHIN_S = 20
RUN = (
    "student.depth=1",
    "train.batch_size_per_gpu=4",
    f"train.OFFICIAL_EPOCH_LENGTH={STEPS}",
    "compute_precision.sharding_strategy=FULL_SHARD",
    "checkpointing.period=2",
    f"checkpointing.max_to_keep={KEPT}",
)
# The runs take turns with these; {copies} is a second folder.
SETTINGS = {
    "plain": (),
    "a loader's process": ("train.num_workers=1",),
    "accumulation": ("optim.gradient_accumulation_steps=2", "train.batch_size_per_gpu=2"),
    "copies": ("checkpointing.copy_to={copies}",),
    "evaluations": (
        "evaluation.eval_period_iterations=11",
        "evaluation.health.num_images=64",
        "checkpointing.save_best=rankme",
    ),
}
# What the kill waits for: the kind of change in a folder, and the file. None: nothing.
AIMS = {
    "at any time": None,
    "a rank file is being written": ("created", r"model_.*\.pth\.tmp"),
    "a rank file has its name": ("renamed", r"model_.*\.pth"),
    "the manifest is being written": ("created", r"model_.*\.json\.tmp"),
    "the manifest has its name": ("renamed", r"model_.*\.json"),
    "the tag has its name": ("renamed", r"last_checkpoint\..*"),
    "an old checkpoint is being deleted": ("deleted", r"model_.*\.(json|pth)"),
}
SHARES = (4, 2, 2, 2, 2, 1, 2)  # of the aims, in this order

pytestmark = [pytest.mark.integration, pytest.mark.dist]


def test_a_run_killed_at_any_instant_ends_like_one_that_was_not(tmp_path, capsys):
    memory = Path("/dev/shm")
    with contextlib.ExitStack() as stack:
        root = tmp_path
        if os.access(memory, os.W_OK):
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory, prefix="kills-")))
        args = {"root": str(root), "seed": SEED, "num_kills": KILLS}
        counts = run_alone(kill_runs, args=args, timeout_s=3600)
    with capsys.disabled():
        print(f"\nseed={SEED}")
        for title, found in counts.items():
            print(f"{title}:", ", ".join(f"{count} {name}" for name, count in sorted(found.items())))
    assert sum(counts["kills"].values()) == KILLS
    assert set(counts["kills"]) == set(AIMS)


def kill_runs(root, seed, num_kills):
    """Kill runs until there are enough kills; returns counts, and raises as soon as a run is not what it should be."""
    started_s = time.monotonic()
    chance = random.Random(seed)
    straight = {setting: Run(Path(root) / setting.replace(" ", "_"), setting) for setting in SETTINGS}
    for run in straight.values():
        run.go_on()
        run.import_what_it_has_imported()  # into this process, for all forks that follow
    counts = {title: Counter() for title in ("kills", "killed", "left behind", "the other rank", "restarts", "runs")}
    while counts["kills"].total() < num_kills:
        setting = list(SETTINGS)[counts["runs"].total() % len(SETTINGS)]
        run = Run(Path(root) / "run", setting)
        while counts["kills"].total() < num_kills:
            kill = Kill(chance, whole_s=straight[setting].last_s)
            if not run.go_on(kill):
                break
            kill.count(counts, left=run.left_behind())
        else:
            run.go_on()
        run.require_same_as(straight[setting])
        counts["runs"][setting] += 1
        counts["restarts"] += run.restarts
        shutil.rmtree(run.root)
        print(f"{counts['kills'].total()} kills after {time.monotonic() - started_s:.0f} s", file=sys.stderr)
    counts["seconds"] = {"in all": round(time.monotonic() - started_s)}
    return {title: dict(found) for title, found in counts.items()}


class Kill:
    """When a run is killed, and which of its ranks."""

    def __init__(self, chance, *, whole_s):
        (self.aim,) = chance.choices(list(AIMS), SHARES)
        self.ranks = chance.choice([(0, 1), (1, 0), (0,), (1,)])
        self._is_at_the_end = chance.random() < 0.1  # while the last checkpoint is saved
        self._num_before = 0 if self._is_at_the_end else chance.choice([0, 0, 0, 1, 2])  # of such changes, which pass
        few_ms = chance.choice([0, chance.uniform(0, 0.005)])
        self._delay_s = chance.uniform(0, whole_s / 3) if AIMS[self.aim] is None else few_ms
        self.survivor = None  # what became of the rank that was not killed

    def strike(self, ranks, events):
        """Wait for the instant and kill; returns False if a rank has ended before."""
        if AIMS[self.aim] is not None:
            kind, pattern = AIMS[self.aim]
            num_seen, is_time = 0, not self._is_at_the_end
            while num_seen <= self._num_before:
                ranks.wait(also=events.descriptor)
                if len(ranks.running) < 2:
                    return False
                for found, name in events.read():
                    is_time = is_time or name.startswith(LAST)
                    num_seen += is_time and found == kind and bool(re.fullmatch(pattern, name))
        end_s = time.monotonic() + self._delay_s
        while time.monotonic() < end_s and len(ranks.running) == 2:
            ranks.wait(end_s - time.monotonic())
        if len(ranks.running) < 2:
            return False
        ranks.kill(*self.ranks)
        if len(self.ranks) == 1:
            (other,) = {0, 1} - set(self.ranks)
            ended = ranks.wait_for_all(ENDS_WITHIN_S)
            self.survivor = f"ended with {ranks.exit_codes[other]}" if ended else "had to be killed"
        ranks.kill(0, 1)
        ranks.wait_for_all(ENDS_WITHIN_S)
        return any(ranks.exit_codes[rank] == -9 for rank in self.ranks)

    def count(self, counts, *, left):
        counts["kills"][self.aim] += 1
        counts["killed"]["both ranks" if len(self.ranks) == 2 else f"rank {self.ranks[0]} alone"] += 1
        counts["left behind"].update(left)
        if self.survivor:
            counts["the other rank"][self.survivor] += 1


class Run:
    """A run of two processes, started again after every kill."""

    def __init__(self, root, setting):
        self.root, self.folder, self.copies, self.logs = root, root / "run", root / "copies", root / "logs"
        for path in (self.folder, self.copies, self.logs):
            path.mkdir(parents=True)
        self.options = [option.format(copies=self.copies) for option in (*TINY_RUN, *RUN, *SETTINGS[setting])]
        self.setting = setting
        self.newest = -1  # iteration of the newest checkpoint that was ever complete
        self.restarts = Counter()
        self.last_s = 0.0  # how long the last start went on
        self._num_starts = 0

    def go_on(self, kill=None):
        """Start the ranks and return whether they were killed; they have finished the run otherwise."""
        started_s = time.monotonic()
        events = FolderEvents(self.folder, self.copies)
        with contextlib.closing(events), ForkedRanks(self._train, num_processes=2, log_dir=self.logs) as ranks:
            killed = kill is not None and kill.strike(ranks, events)
            if not killed:
                assert ranks.wait_for_all(120), self._describe("goes on and on")
                assert ranks.exit_codes == {0: 0, 1: 0}, self._describe(f"ended with {ranks.exit_codes}")
        self.last_s = time.monotonic() - started_s
        self._require_that_it_went_on(killed)
        self.newest = max(self.newest, self._newest_complete())
        return killed

    def _train(self):
        # Some die thrice before their first checkpoint.
        code = main(["--retry", "--output-dir", str(self.folder), *self.options])
        (self.logs / "modules.txt").write_text("\n".join(sys.modules))
        return code

    def import_what_it_has_imported(self):
        for name in (self.logs / "modules.txt").read_text().split("\n"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def _require_that_it_went_on(self, killed):
        log = self._log(0)
        loaded = re.findall(r"loaded \S+, saved after iteration (\d+)", log)
        assert "is damaged" not in log, self._describe("found a damaged checkpoint")
        if loaded or not killed:
            assert [int(number) for number in loaded] == [self.newest] * (self.newest >= 0), self._describe(
                f"went on after {loaded}, not {self.newest}"
            )
        if self._num_starts:
            kind = "went on from a checkpoint" if loaded else "began anew" if self.newest < 0 else "killed at once"
            self.restarts[kind] += 1
        self._num_starts += 1

    def _newest_complete(self):
        names = [*find_checkpoints(self.folder), *find_checkpoints(self.copies)]
        return max(map(iteration_of, names), default=-1)

    def left_behind(self):
        """Say what a kill has left unfinished in the folder."""
        names = [path.name for path in (*self.folder.iterdir(), *self.copies.iterdir())]
        complete = find_checkpoints(self.folder)
        tags = [self.folder / f"last_checkpoint.rank_{rank}" for rank in range(2)]
        tagged = [tag.read_text().strip() for tag in tags if tag.is_file()]
        left = {
            "temporary files": any(name.endswith(".tmp") for name in names),
            "rank files without manifest": any(
                name.endswith(".pth") and not has_manifest(folder, name.split(".")[0])
                for folder in (self.folder, self.copies)
                for name in os.listdir(folder)
            ),
            "an old checkpoint too many": len(complete) > KEPT + ("evaluations" in self.setting),
            "an old tag": bool(complete) and tagged != [f"{complete[-1]}.rank_{rank}.pth" for rank in range(2)],
        }
        return [name for name, is_left in left.items() if is_left] or ["nothing"]

    def require_same_as(self, straight):
        """Compare all that the run has left behind with that of a run that was not killed."""
        for mine, other in ((self.folder, straight.folder), (self.copies, straight.copies)):
            assert files_of(mine) == files_of(other), self._describe("has left other files")
            if any(mine.iterdir()):
                assert_same_state(mine, other, name=LAST, num_ranks=2)
            for pattern in ("last_checkpoint.*", "best_checkpoint.json", "eval/*/results_*.json"):
                for path in other.glob(pattern):
                    found = (mine / path.relative_to(other)).read_text()
                    assert found == path.read_text(), self._describe(f"has another {path.name}: {found}")
        rows = metrics_of(self.folder)
        assert [row["iteration"] for row in rows] == list(range(STEPS))
        assert values_but_timing(rows) == values_but_timing(metrics_of(straight.folder))

    def _log(self, rank):
        return (self.logs / f"rank_{rank}.std.log").read_text(errors="replace")

    def _describe(self, problem):
        files = "\n".join(files_of(self.folder) + files_of(self.copies))
        return f"the run ({self.setting}) {problem}\n{files}\n{self._log(0)[-3000:]}\n{self._log(1)[-3000:]}"


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
