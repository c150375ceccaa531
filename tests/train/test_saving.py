"""What a run saves besides its period, and what it does when saving, or its folder, fails."""

import json
import shutil
import time

import pytest
import torch
from support.training import metrics_of, train

from dinov2.fsdp import PeriodicCheckpointer
from dinov2.train import train as program
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.stop_signal import StopSignal
from dinov2.train.update import agree

EACH_STEP = ("checkpointing.period=1", "checkpointing.max_to_keep=2")
EVALUATED = ("evaluation.eval_period_iterations=1", "evaluation.health.num_images=8")


def sentence_of(capsys, folder, *options, code=1):
    capsys.readouterr()
    assert train(folder, *options) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines), lines
    return lines[-1].removeprefix("error: ")


def saved_steps(folder):
    return sorted(int(path.name[6:13]) for path in folder.glob("model_*.manifest.json"))


@pytest.fixture
def scores(monkeypatch):
    """Let evaluations give these scores, one after the other; those of the start come first."""
    given = iter([1.0, 5.0, 9.0, 7.0, 8.0, 6.0])
    evaluate = TeacherEvaluation.__call__

    def scored(self, model, name):
        evaluate(self, model, name)
        self.last_scores = {"accuracy": next(given)}
        return self.last_scores

    monkeypatch.setattr(TeacherEvaluation, "__call__", scored)


def test_the_best_checkpoint_outlives_newer_ones(tmp_path, scores):
    best = ["checkpointing.save_best=accuracy", "evaluation.at_start=true", *EVALUATED, *EACH_STEP]
    assert train(tmp_path, *best, "train.max_steps=5") == 0
    assert saved_steps(tmp_path) == [1, 3, 4]
    assert json.loads((tmp_path / "best_checkpoint.json").read_text()) == {
        "name": "model_0000001",
        "metric": "accuracy",
        "value": 9.0,
    }


def test_the_best_checkpoint_is_saved_between_periods(tmp_path, scores):
    best = ["checkpointing.save_best=accuracy", "checkpointing.save_best_mode=min", "evaluation.at_start=true"]
    assert train(tmp_path, *best, *EVALUATED, "train.max_steps=3") == 0
    assert saved_steps(tmp_path) == [0, 2]


def test_a_score_that_nothing_gives_is_refused_before_the_first_step(tmp_path, capsys, scores):
    options = ["checkpointing.save_best=acuracy", "evaluation.at_start=true", *EVALUATED]
    assert sentence_of(capsys, tmp_path, *options, code=2) == (
        "checkpointing.save_best=acuracy is no score of this run's evaluations; they give accuracy"
    )
    assert not (tmp_path / "training_metrics.json").exists()


def test_a_resumed_run_may_choose_the_best_by_a_score_that_is_new(tmp_path, capsys, request):
    assert train(tmp_path, *EVALUATED, *EACH_STEP, "train.max_steps=2") == 0
    options = [*EVALUATED, *EACH_STEP, "checkpointing.save_best=accuracy", "train.max_steps=3"]
    assert sentence_of(capsys, tmp_path, *options, code=2).startswith("checkpointing.save_best=accuracy is no score of")
    request.getfixturevalue("scores")
    assert train(tmp_path, *options, "evaluation.health.num_images=9") == 0
    assert json.loads((tmp_path / "best_checkpoint.json").read_text())["metric"] == "accuracy"


def test_a_run_that_was_killed_before_its_last_evaluation_is_evaluated(tmp_path):
    options = [*EVALUATED, "evaluation.eval_period_iterations=2", "evaluation.at_start=true", "train.max_steps=2"]
    assert train(tmp_path, *options) == 0
    rows, results = metrics_of(tmp_path), tmp_path / "eval" / "training_1"
    kept = torch.load(results / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    for path in results.iterdir():
        path.write_bytes(b"")  # as a power failure may leave it
    lines = [{k: v for k, v in row.items() if not k.startswith(("health", "rankme"))} for row in rows]
    (tmp_path / "training_metrics.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    assert train(tmp_path, *options) == 0
    again = torch.load(results / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)
    assert metrics_of(tmp_path) == rows and set(rows[1]) - set(rows[0])


def test_a_stop_saves_and_leaves_the_evaluation_to_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(StopSignal, "__enter__", lambda self: setattr(self, "received", "SIGTERM") or self)
    options = [*EVALUATED, "train.max_steps=2"]
    assert train(tmp_path, *options) == 0
    assert saved_steps(tmp_path) == [0] and not (tmp_path / "eval").exists()
    monkeypatch.undo()
    assert train(tmp_path, *options) == 0
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["training_0", "training_1"]


def test_minutes_of_a_clock_that_nobody_sets(tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 25))  # each look at the clock takes 25 s
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    assert train(tmp_path, "checkpointing.period_minutes=0.8", "checkpointing.max_to_keep=null") == 0
    steps = saved_steps(tmp_path)
    assert 2 <= len(steps) < 6 and steps[-1] == 5


def test_flags_of_a_step():
    verdict = agree(torch.tensor(1.0), torch.tensor(float("inf")), stop=False, save_due=True, failed=True)
    assert (verdict.is_finite, verdict.stop, verdict.save_due, verdict.failed) == (False, False, True, True)
    verdict = agree(torch.tensor(1.0), torch.tensor(1.0), stop=True)
    assert (verdict.is_finite, verdict.stop, verdict.save_due, verdict.failed) == (True, True, False, False)


def test_an_error_while_training_does_not_lose_the_checkpoint_being_written(tmp_path, monkeypatch):
    write, forward_backward = program.PeriodicCheckpointer.save_now, program.forward_backward

    def slow_save(self, iteration, **kwargs):
        self.checkpointer.submit(lambda: time.sleep(0.5))  # occupies the writer
        write(self, iteration, **kwargs)

    def fail_later(*args, **kwargs):
        if fail_later.calls == 1:
            raise RuntimeError("an error that nobody foresaw")
        fail_later.calls += 1
        return forward_backward(*args, **kwargs)

    fail_later.calls = 0
    monkeypatch.setattr(PeriodicCheckpointer, "save_now", slow_save)
    monkeypatch.setattr(program, "forward_backward", fail_later)
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        train(tmp_path, *EACH_STEP)
    assert saved_steps(tmp_path) == [0]


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_folder_that_vanishes(tmp_path, capsys, monkeypatch, background):
    folder, forward_backward = tmp_path / "run", program.forward_backward

    def vanish(*args, **kwargs):
        shutil.rmtree(folder, ignore_errors=True)
        return forward_backward(*args, **kwargs)

    monkeypatch.setattr(program, "forward_backward", vanish)
    assert sentence_of(capsys, folder, *EACH_STEP, f"checkpointing.background={background}") == (
        f"model_0000000 could not be written to {folder} (rank 0: No such file or directory); earlier checkpoints are "
        "intact"
    )
    assert not folder.exists()


def test_a_second_folder_holds_copies_and_the_run_goes_on_from_them(tmp_path):
    run, copies = tmp_path / "run", tmp_path / "copies"
    assert train(run, *EACH_STEP, f"checkpointing.copy_to={copies}", "train.max_steps=3") == 0
    assert saved_steps(copies) == saved_steps(run) == [1, 2]
    shutil.rmtree(run)
    assert train(run, *EACH_STEP, f"checkpointing.copy_to={copies}", "train.max_steps=4") == 0
    assert [row["iteration"] for row in metrics_of(run)] == [3]


def test_copies_of_another_run_are_not_continued(tmp_path, capsys):
    copies = f"checkpointing.copy_to={tmp_path}/copies"
    assert train(tmp_path / "one", copies, "train.max_steps=1") == 0
    assert sentence_of(capsys, tmp_path / "two", copies, code=2) == (
        f"{copies} holds copies of the run in {tmp_path}/one, not of train.output_dir={tmp_path}/two; name another "
        f"folder (to go on from one of them: train.resume_path={tmp_path}/copies/model_0000000)"
    )
    shutil.rmtree(tmp_path / "one")
    assert sentence_of(capsys, tmp_path / "one", copies, "--no-resume", code=2) == (
        f"{copies} holds a run and --no-resume (train.resume=false) would start anew; add --overwrite to remove it, or "
        f"choose another folder"
    )
    assert train(tmp_path / "one", copies, "--no-resume", "--overwrite", "train.max_steps=2") == 0
    assert saved_steps(tmp_path / "copies") == [1]


def test_copies_of_a_run_of_the_same_name_elsewhere_are_not_continued(tmp_path, capsys, monkeypatch):
    copies = f"checkpointing.copy_to={tmp_path}/copies"
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert train("run", copies, "train.max_steps=1") == 0
    assert train("run", copies, "train.max_steps=2") == 0
    monkeypatch.chdir(tmp_path / "two")
    assert sentence_of(capsys, "run", copies, code=2).startswith(
        f"{copies} holds copies of the run in {tmp_path}/one/run, not of train.output_dir=run; name another folder"
    )


def test_eval_only_neither_locks_nor_cleans_up(tmp_path):
    assert train(tmp_path, "train.max_steps=1") == 0
    (tmp_path / ".lock").unlink()
    left = [tmp_path / "model_0000007.rank_0.pth", tmp_path / "model_0000008.rank_0.pth.tmp"]
    for path in left:
        path.write_bytes(b"being written by a run elsewhere")
    assert train(tmp_path, "--eval-only") == 0
    assert all(path.exists() for path in left) and not (tmp_path / ".lock").exists()
    assert train(tmp_path, "train.max_steps=1") == 0
    assert not any(path.exists() for path in left)
