"""Saving and resuming: bit for bit, on one and two processes, after damage, failed writes and kills."""

import logging
import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from support.dist import run_distributed
from support.toy_fsdp import make_toy
from support.toy_run import STRATEGIES, Position, Run, copy_of, flip_byte, names, same

from dinov2 import checkpoint_format, distributed, fsdp
from dinov2.errors import CheckpointError


def test_six_steps_equal_three_resume_three(tmp_path):
    straight = Run(tmp_path / "straight", period=100).train(6)
    first = Run(tmp_path / "run").train(3)
    before = copy_of(first.contents())
    second = Run(tmp_path / "run", seed=5)
    assert not same(second.contents(), before)
    assert second.resume() == {"iteration": 2, "note": "after 2"}
    assert same(second.contents(), before)
    assert same(second.train(6).contents(), straight.contents())
    assert names(tmp_path / "run") == [
        "last_checkpoint.rank_0",
        "model_0000002.manifest.json",
        "model_0000002.rank_0.pth",
        "model_0000005.manifest.json",
        "model_0000005.rank_0.pth",
    ]
    assert (tmp_path / "run" / "last_checkpoint.rank_0").read_text() == "model_0000005.rank_0.pth"
    assert first.checkpointer.has_checkpoint()
    assert first.checkpointer.get_checkpoint_file() == str(tmp_path / "run" / "model_0000005.rank_0.pth")
    stored = torch.load(tmp_path / "run" / "model_0000005.rank_0.pth", weights_only=True)
    assert stored["config"] == "train:\n  seed: 0\n"
    assert stored["layout"]["model/student.head.mlp.weight"] == {"global_shape": [6, 6], "offset": [0, 0]}
    assert "student.head.mlp.weight" in stored["checkpointables"]["optimizer"]["state"]


def test_nothing_to_resume_loads_the_given_weights_only(tmp_path):
    trained = Run(tmp_path / "old").train(3)
    fresh = Run(tmp_path / "new", seed=5)
    assert fresh.resume() == {} and not fresh.checkpointer.has_checkpoint()
    assert fresh.checkpointer.get_checkpoint_file() == ""
    pattern = str(tmp_path / "old" / "model_0000002.rank_{rank}.pth")
    assert fresh.checkpointer.resume_or_load(pattern)["iteration"] == 2
    assert same(fresh.contents()["model"], trained.contents()["model"])
    assert fresh.position.consumed == 0
    assert fresh.checkpointer.load(pattern)["iteration"] == 2
    assert same(fresh.contents(), trained.contents())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    run = Run(tmp_path).train(9)
    weights = run.contents()["model"]["student.head.mlp.weight"]
    flip_byte(tmp_path / "model_0000008.rank_0.pth", weights)
    path = tmp_path / "model_0000005.rank_0.pth"
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "model_0000011.rank_0.pth").touch()
    (tmp_path / "model_0000011.rank_1.pth.tmp").touch()
    resumed = Run(tmp_path, seed=5)
    with caplog.at_level(logging.WARNING):
        assert resumed.resume()["iteration"] == 2
    warnings = [record.getMessage().split(",")[0] for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["model_0000008 is damaged", "model_0000005 is damaged"]
    assert same(resumed.train(9).contents(), run.contents())
    assert Run(tmp_path).resume()["iteration"] == 8  # the damaged ones have been replaced

    for number in (2, 5, 8):
        (tmp_path / f"model_000000{number}.rank_0.pth").unlink()
    with pytest.raises(CheckpointError) as error:
        Run(tmp_path).resume()
    assert str(error.value) == (
        f"none of the 3 checkpoints in {tmp_path} is sound (model_0000008: 0 of 1 rank files found, "
        "model_0000008.rank_0.pth is missing); "
        "pass --no-resume to start again"
    )


def test_a_run_killed_before_the_manifest_resumes_from_the_checkpoint_before(tmp_path, monkeypatch):
    Run(tmp_path).train(3)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(checkpoint_format, "write_manifest", lambda *_: os._exit(9))
        resumed = Run(tmp_path, seed=5)
        resumed.resume()
        resumed.train(6)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert "model_0000005.rank_0.pth" in names(tmp_path)
    resumed = Run(tmp_path, seed=7)
    assert resumed.resume()["iteration"] == 2
    assert same(resumed.train(6).contents(), Run(tmp_path / "straight").train(6).contents())
    assert Run(tmp_path).resume()["iteration"] == 5


def test_retention_goes_on_after_resume(tmp_path):
    options = {"period": 1, "max_to_keep": 2, "keep_every": 4}
    Run(tmp_path, **options).train(4)
    assert checkpoint_format.find_checkpoints(tmp_path) == ["model_0000001", "model_0000002", "model_0000003"]
    (tmp_path / "model_0000000.rank_0.pth").touch()  # deletion was interrupted here
    resumed = Run(tmp_path, max_iter=7, **options | {"period": 2})
    resumed.resume()
    assert [iteration for iteration in range(8) if resumed.periodic.is_due(iteration)] == [1, 3, 5, 6, 7]
    resumed.train(7)
    kept = ["model_0000003", "model_0000005", "model_0000006"]
    assert checkpoint_format.find_checkpoints(tmp_path) == kept
    assert [name for name in names(tmp_path) if name.endswith(".pth")] == [f"{name}.rank_0.pth" for name in kept]
    resumed.periodic.save_now(9, note="stopped")
    assert checkpoint_format.find_checkpoints(tmp_path) == ["model_0000003", "model_0000006", "model_0000009"]
    assert resumed.checkpointer.load(str(tmp_path / "model_0000009"))["note"] == "stopped"


def test_an_optimiser_that_groups_the_same_parameters_differently_goes_on_with_its_own_settings(tmp_path):
    run = Run(tmp_path).train(3)
    other = Run(tmp_path, seed=5)
    first, *others = [p for p in other.model["student"].parameters() if p.requires_grad]
    regrouped = torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": others}])
    other.checkpointer.checkpointables["optimizer"] = regrouped
    other.checkpointer.load(str(tmp_path / "model_0000002"))
    assert [group["lr"] for group in regrouped.param_groups] == [0.5, 0.001]
    values = {name: run.optimizer.state[param] for name, param in run.model["student"].named_parameters()}
    for name, param in other.model["student"].named_parameters():
        assert same(regrouped.state.get(param, {}), values[name])


def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path):
    run = Run(tmp_path).train(3)
    path = str(tmp_path / "model_0000002")

    def refused(**changes):
        other = Run(tmp_path, seed=5)
        for name, value in changes.items():
            setattr(other.checkpointer, name, value)
        with pytest.raises(CheckpointError) as error:
            other.checkpointer.load(path)
        return str(error.value)

    smaller = torch.nn.ModuleDict({"student": make_toy(1)})
    assert refused(model=smaller) == (
        "the checkpoint does not fit the model: 0 missing (first: none), 18 unexpected "
        "(first: teacher.backbone.blocks.0.gamma)"
    )
    wider = Run(tmp_path).model
    wider["student"]["head"].mlp = torch.nn.Linear(6, 7)
    assert refused(model=wider) == (
        "the checkpoint does not fit the model: student.head.mlp.weight is (6, 6) torch.float32, "
        "the model needs (7, 6) torch.float32"
    )
    params = [p for p in run.model["student"].parameters() if p.requires_grad]
    fewer = {"model": run.model, "checkpointables": {"optimizer": torch.optim.AdamW(params[1:])}}
    assert refused(**fewer) == (
        "the checkpoint's optimiser does not train the same parameters: student.backbone.scale is the checkpoint's "
        "alone"
    )
    assert (
        refused(checkpointables={"ema": Position()}) == "model_0000002 holds no ema; it was saved by a run without one"
    )
    enabled = {"grad_scaler": Position()}
    assert refused(checkpointables=enabled) == "model_0000002: the state of grad_scaler does not fit: 'consumed'"
    with pytest.raises(CheckpointError) as error:
        run.checkpointer.load(str(tmp_path / "model_0000004.rank_0.pth"))
    assert str(error.value) == (
        f"model_0000004: there is no model_0000004.manifest.json in {tmp_path}, so it is not complete"
    )
    with pytest.raises(ValueError, match="save needs iteration"):
        run.checkpointer.save("model_0000009")


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as error:
        Run(tmp_path / "file" / "run").train(3)
    assert str(error.value) == (
        f"model_0000002 could not be written to {tmp_path}/file/run (rank 0: Not a directory); "
        "earlier checkpoints are intact"
    )


def test_rng_state_holds_every_generator():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    random.gauss(0, 1), np.random.standard_normal()
    state = checkpoint_format.to_plain(fsdp.RngState().state_dict())

    def draw():
        return [
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(()).item(),
        ]

    first = draw()
    assert draw() != first
    fsdp.RngState().load_state_dict(state)
    assert draw() == first


def two_ranks(folder):
    rank = distributed.get_rank()
    folder = Path(folder)
    errors, results = [], {}

    def refused(call):
        try:
            call()
        except CheckpointError as error:
            errors.append(str(error).replace(str(folder), "RUN"))

    for strategy in STRATEGIES:
        straight = Run(folder / f"{strategy}-straight", strategy=strategy, period=100).train(6)
        Run(folder / strategy, strategy=strategy).train(3)
        resumed = Run(folder / strategy, strategy=strategy, seed=5)
        resumed.resume()
        results[strategy] = same(resumed.train(6).contents(), straight.contents())
    distributed.barrier()

    shared = folder / "FULL_SHARD"
    results["names"] = names(shared)
    results["file"] = Path(resumed.checkpointer.get_checkpoint_file()).name
    # rank 1's disk is full: nothing is left on either rank, the old ones stay
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    failing = Run(shared, strategy="FULL_SHARD")
    failing.resume()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    refused(lambda: failing.periodic.save_now(7))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    distributed.barrier()
    results["names_after_full_disk"] = names(shared)
    results["size"] = (shared / "model_0000005.rank_1.pth").stat().st_size
    # one byte of rank 1's newest file changes
    if rank == 1:
        flip_byte(shared / "model_0000005.rank_1.pth", failing.contents()["model"]["student.head.mlp.weight"])
    distributed.barrier()
    again = Run(shared, strategy="FULL_SHARD")
    results["iteration_after_damage"] = again.resume()["iteration"]
    refused(lambda: again.checkpointer.load(str(shared / "model_0000005.rank_{rank}.pth")))
    distributed.barrier()
    if rank == 0:
        (shared / "model_0000005.rank_1.pth").unlink()
    distributed.barrier()
    refused(lambda: again.checkpointer.load(str(shared / "model_0000005")))
    return {"errors": errors, "results": results}


@pytest.mark.dist
def test_two_ranks_resume_bit_for_bit_and_fail_together(tmp_path):
    ranks = run_distributed(two_ranks, args={"folder": str(tmp_path)})
    expected_names = ["last_checkpoint.rank_0", "last_checkpoint.rank_1"]
    for number in (2, 5):
        expected_names += [f"model_000000{number}.{rest}" for rest in ("manifest.json", "rank_0.pth", "rank_1.pth")]
    size = ranks[0]["results"]["size"]
    for rank, found in enumerate(ranks):
        results = found["results"]
        assert [results[strategy] for strategy in STRATEGIES] == [True] * 4
        assert results["names"] == expected_names == results["names_after_full_disk"]
        assert results["file"] == f"model_0000005.rank_{rank}.pth"
        assert results["iteration_after_damage"] == 2
        assert found["errors"] == [
            "model_0000007 could not be written to RUN/FULL_SHARD (rank 1: File too large); "
            "earlier checkpoints are intact",
            f"model_0000005.rank_1.pth: bytes 0 to {size - 1} do not match their checksum",
            "model_0000005: 1 of 2 rank files found, model_0000005.rank_1.pth is missing",
        ]
