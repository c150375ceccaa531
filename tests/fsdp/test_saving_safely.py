"""Saving in the background, its failures, a second folder, the best checkpoint, and kills at every instant."""

import json
import logging
import os
import resource
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.dist import run_distributed
from support.toy_run import Run, copy_of, names, same

from dinov2 import checkpoint_format, distributed
from dinov2.checkpoint_format import find_checkpoints
from dinov2.errors import CheckpointError
from dinov2.fsdp import checkpointer
from dinov2.fsdp.writer import write_checkpoint
from dinov2.run.checkpoint_verify import verify


@contextmanager
def full_disk(limit_bytes):
    """Let every file of this process end at `limit_bytes`, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_written_in_the_background_is_the_state_at_the_time_of_saving(tmp_path):
    run = Run(tmp_path, background=True).train(3)
    for iteration in (3, 4):  # the second one uses the memory of the first again
        saved = copy_of(run.contents())
        run.periodic.save_now(iteration, note="x")
        run.train(run.iteration + 1)
        assert not same(run.contents()["model"], saved["model"])
        run.periodic.finish()
        again = Run(tmp_path, seed=5)
        again.checkpointer.load(str(tmp_path / checkpoint_format.checkpoint_name(iteration)))
        assert same(again.contents(), saved)
    assert find_checkpoints(tmp_path) == ["model_0000002", "model_0000003", "model_0000004"]
    run.checkpointer.close()
    run.checkpointer.close()  # harmless


def test_a_manifest_names_the_global_batch_of_its_step(tmp_path, monkeypatch):
    """The next step may have another one by the time the manifest is written."""
    may_write = threading.Event()

    def write_later(*args, **kwargs):
        may_write.wait(60)
        write_checkpoint(*args, **kwargs)

    monkeypatch.setattr(checkpointer, "write_checkpoint", write_later)
    run = Run(tmp_path, background=True)
    run.checkpointer.save("model_0000000", iteration=0)
    run.checkpointer.global_batch_size = 6
    may_write.set()
    run.checkpointer.close()
    assert checkpoint_format.open_checkpoint(tmp_path, "model_0000000").global_batch_size == 12


def test_a_failure_in_the_background_stops_the_run(tmp_path):
    run = Run(tmp_path, background=True).train(3)
    run.periodic.finish()
    assert not run.checkpointer.failed
    before = names(tmp_path)
    with full_disk(1000):
        run.periodic.save_now(3)
        run.checkpointer.wait()
    assert run.checkpointer.failed and names(tmp_path) == before
    sentence = (
        f"model_0000003 could not be written to {tmp_path} (rank 0: File too large); earlier checkpoints are intact"
    )
    with pytest.raises(CheckpointError) as error:
        run.periodic.finish()
    assert str(error.value) == sentence
    with full_disk(1000):
        run.periodic.save_now(4)
        run.checkpointer.wait()
    with pytest.raises(CheckpointError):  # whoever does not ask hears of it at the next save
        run.periodic.save_now(5)
    run.checkpointer.close()


def test_a_folder_that_vanished_is_not_made_again(tmp_path):
    folder = tmp_path / "new" / "run"
    run = Run(folder).train(3)
    assert find_checkpoints(folder) == ["model_0000002"]
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError) as error:
        run.periodic.save_now(3)
    assert str(error.value) == (
        f"model_0000003 could not be written to {folder} (rank 0: No such file or directory); "
        "earlier checkpoints are intact"
    )
    assert not folder.exists()


def test_a_failed_replacement_leaves_the_first_one(tmp_path):
    run = Run(tmp_path).train(3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(1000), pytest.raises(CheckpointError):
        run.checkpointer.save("model_0000002", iteration=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run.checkpointer.save("model_0000002", iteration=2, note="second")
    assert run.checkpointer.load(str(tmp_path / "model_0000002"))["note"] == "second"


def test_the_best_checkpoint_is_kept(tmp_path):
    options = {"period": 100, "max_to_keep": 1, "save_best": "knn_top1_pct"}
    run = Run(tmp_path, **options)
    for iteration, score in enumerate((50.0, 70.0, 60.0, float("nan"), 65.0)):
        run.train(iteration + 1)
        if iteration % 2 == 0:
            run.periodic.save_now(iteration, note="due")
        run.periodic.note_scores(iteration, {"knn_top1_pct": score}, note="noted")
    assert find_checkpoints(tmp_path) == ["model_0000001", "model_0000004"]
    best = json.loads((tmp_path / "best_checkpoint.json").read_text())
    assert best == {"name": "model_0000001", "metric": "knn_top1_pct", "value": 70.0}
    assert checkpoint_format.open_checkpoint(tmp_path, "model_0000001").metrics == {"knn_top1_pct": 70.0}
    resumed = Run(tmp_path, **options)
    resumed.resume()
    resumed.periodic.note_scores(5, {"knn_top1_pct": 69.0})
    assert find_checkpoints(tmp_path) == ["model_0000001", "model_0000004"]
    resumed.periodic.note_scores(6, {"knn_top1_pct": 71.0})
    assert find_checkpoints(tmp_path) == ["model_0000006"]
    lowest = Run(tmp_path / "loss", period=100, save_best="loss", save_best_mode="min")
    for iteration, loss in enumerate((2.0, 1.0, 3.0)):
        lowest.periodic.note_scores(iteration, {"loss": loss})
    assert find_checkpoints(tmp_path / "loss") == ["model_0000000", "model_0000001"]


def test_a_run_that_goes_on_from_its_copies_knows_the_best_score(tmp_path):
    options = {"period": 1, "max_to_keep": 1, "save_best": "top1", "copy_to": str(tmp_path / "copies")}
    run = Run(tmp_path / "run", **options).train(1)
    run.periodic.note_scores(0, {"top1": 70.0})
    run.train(2)
    shutil.rmtree(tmp_path / "run")
    resumed = Run(tmp_path / "run", **options)
    resumed.resume()
    resumed.train(3)
    resumed.periodic.note_scores(2, {"top1": 60.0})
    assert find_checkpoints(tmp_path / "copies") == ["model_0000000", "model_0000002"]


def test_an_old_run_may_have_longer_numbers(tmp_path):
    run = Run(tmp_path, period=1, max_to_keep=1)
    for iteration in (10_000_000, 9_999_998, 9_999_999):
        run.periodic.save_now(iteration)
    assert find_checkpoints(tmp_path) == ["model_9999999", "model_10000000"]


def test_a_resumed_run_does_not_hold_on_to_deleted_files(tmp_path):
    Run(tmp_path, period=1).train(1)
    resumed = Run(tmp_path, period=1)
    resumed.resume()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert resumed.checkpointer.loaded.model  # and can still be read


def test_a_score_that_is_not_there_is_said_once(tmp_path, caplog):
    run = Run(tmp_path, save_best="top5")
    for iteration in range(2):
        run.periodic.note_scores(iteration, {"top1": 1.0, "map": 2.0})
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert messages == ["no score top5 to choose the best checkpoint by; there are ['top1', 'map']"]
    assert names(tmp_path) == []


def test_minutes_are_counted_from_the_last_save(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run = Run(tmp_path, period=100, period_minutes=2)
    now[0] += 119
    assert not run.periodic.minutes_are_over()
    now[0] += 1
    assert run.periodic.minutes_are_over()
    assert run.periodic.is_due(0, minutes_due=True) and not run.periodic.is_due(0)
    run.periodic.save_now(0)
    assert not run.periodic.minutes_are_over()


def test_a_second_folder_holds_copies_and_is_resumed_from(tmp_path, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    options = {"period": 1, "max_to_keep": 2, "copy_to": str(second)}
    run = Run(first, **options).train(3)
    kept = ["model_0000001", "model_0000002"]
    assert find_checkpoints(first) == find_checkpoints(second) == kept
    assert all(verify(second, name)[1] == [] for name in kept)
    shutil.rmtree(second)
    with caplog.at_level(logging.WARNING):
        run.train(4)  # goes on
    assert [record.getMessage() for record in caplog.records] == [
        f"model_0000003 could not be written to {second} (rank 0: No such file or directory); earlier checkpoints are "
        f"intact; the run goes on with those in {first}"
    ]
    assert find_checkpoints(first) == ["model_0000002", "model_0000003"] and not second.exists()

    Run(first, **options).train(6)
    shutil.rmtree(first)
    first.mkdir()
    resumed = Run(first, **options)
    assert resumed.checkpointer.newest_manifest().iteration == 5 and resumed.checkpointer.has_checkpoint()
    assert resumed.resume()["iteration"] == 5
    assert resumed.checkpointer.loaded.folder == second
    resumed.train(7)
    assert Run(first, **options).resume()["iteration"] == 6
    (first / "model_0000006.rank_0.pth").write_bytes(b"")
    again = Run(first, **options)
    assert again.resume()["iteration"] == 6 and again.checkpointer.loaded.folder == second


@pytest.mark.integration
def test_a_kill_before_or_after_every_change_of_the_folder_loses_nothing(tmp_path):
    """Killed at the n-th change, for every n: the next start finds a sound checkpoint and leaves no orphans."""
    options = {"period": 1, "max_to_keep": 1, "copy_to": str(tmp_path / "copy"), "save_best": "score"}
    straight = Run(tmp_path / "straight", **options | {"copy_to": str(tmp_path / "other")}).train(3)
    number, ended = 0, False
    while not ended:
        number += 1
        for folder in ("run", "copy"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        child = os.fork()
        if child == 0:
            _die_at(number)
            run = Run(tmp_path / "run", **options).train(1)
            run.periodic.note_scores(0, {"score": 1.0})
            run.train(2)
            run.periodic.note_scores(1, {"score": 2.0})
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        resumed = Run(tmp_path / "run", **options)
        resumed.checkpointer.clean_up()
        left = [name for folder in ("run", "copy") for name in _names_if_any(tmp_path / folder)]
        assert not [name for name in left if name.endswith(".tmp")], number
        for folder in ("run", "copy"):
            complete = find_checkpoints(tmp_path / folder)
            files = [name for name in _names_if_any(tmp_path / folder) if name.endswith(".pth")]
            assert files == [f"{name}.rank_0.pth" for name in complete], number
            assert all(verify(tmp_path / folder, name)[1] == [] for name in complete)
        resumed.resume()
        assert same(resumed.train(3).contents(), straight.contents()), number
    print(f"{number - 1} kills")
    assert number > 30 and find_checkpoints(tmp_path / "run") == ["model_0000001", "model_0000002"]


def _names_if_any(folder):
    return names(folder) if folder.is_dir() else []


def _die_at(number):
    """End this process as kill -9 does, just before the n-th time that it renames, deletes or flushes a file."""
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def fail_on_two_ranks(folder):
    """Rank 1's disk is full while both write in the background; returns what each rank knows and raises."""
    rank = distributed.get_rank()
    run = Run(folder, strategy="FULL_SHARD", background=True).train(3)
    run.periodic.finish()
    with full_disk(1000 if rank == 1 else 1 << 40):
        run.periodic.save_now(3)
        run.train(4)  # goes on meanwhile
        run.checkpointer.wait()
    distributed.barrier()
    found = {"failed": run.checkpointer.failed, "names": names(folder)}
    try:
        run.periodic.finish()
    except CheckpointError as error:
        found["sentence"] = str(error).replace(folder, "RUN")
    run.periodic.save_now(4)
    run.periodic.finish()
    run.checkpointer.close()
    found["then"] = find_checkpoints(Path(folder))
    return found


@pytest.mark.dist
def test_all_ranks_hear_of_one_that_could_not_write(tmp_path):
    for found in run_distributed(fail_on_two_ranks, args={"folder": str(tmp_path)}):
        assert found["failed"] and not [name for name in found["names"] if "0000003" in name]
        assert found["sentence"] == (
            "model_0000003 could not be written to RUN (rank 1: File too large); earlier checkpoints are intact"
        )
        assert found["then"] == ["model_0000002", "model_0000004"]
