"""A run goes on with every other number of processes, and under every other sharding strategy, exactly where it was."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from support.dist import run_distributed
from support.training import ELASTIC_RUN, TINY_RUN, losses_of

from dinov2 import distributed
from dinov2.checkpoint_format import StoredCheckpoint, StoredPieces, checkpoint_name
from dinov2.configs import load_config
from dinov2.fsdp.wrap import STRATEGIES
from dinov2.train.build import build_checkpointer, build_grad_scaler, build_model, build_optimizer
from dinov2.train.resume import resume
from dinov2.train.train import do_train

STOP, STEPS = 3, 5  # a run is saved after 3 steps; the next two are compared
SAVED = checkpoint_name(STOP - 1)
RUN = (*TINY_RUN, *ELASTIC_RUN, "student.depth=1", "compute_precision.hybrid_shard_size=2")

pytestmark = [pytest.mark.integration, pytest.mark.dist]


def train(folder, *options):
    folder.mkdir(parents=True, exist_ok=True)
    cfg = load_config(None, [*RUN, *options, f"train.output_dir={folder}"])
    with mock.patch("dinov2.train.run_log.plot_training_curves"):  # takes longer than the steps
        do_train(cfg, distributed.init("cpu"), output_dir=folder)


def save_runs(root, strategies):
    """Train and save under each strategy with this number of processes."""
    for strategy in strategies:
        folder = Path(root) / f"{distributed.get_world_size()}_{strategy}"
        train(folder, f"train.max_steps={STOP}", f"compute_precision.sharding_strategy={strategy}")


def go_on_with(root, sources, strategies):
    """Load each source under each strategy, save it again at once, and go on from it in another folder."""
    for source in sources:
        for strategy in strategies:
            target = Path(root) / f"{source}_to_{distributed.get_world_size()}_{strategy}"
            options = (
                f"compute_precision.sharding_strategy={strategy}",
                f"train.resume_path={root}/{source}/{SAVED}.rank_{{rank}}.pth",
            )
            load_and_save(target / "again", *options)
            train(target / "on", *options, f"train.max_steps={STEPS}")


def load_and_save(folder, *options):
    cfg = load_config(None, [*RUN, *options, f"train.output_dir={folder}"])
    device = distributed.init("cpu").device
    model = build_model(cfg, device=device)
    optimizer, scaler = build_optimizer(cfg, model), build_grad_scaler(cfg, device=device)
    saver = build_checkpointer(cfg, model, optimizer=optimizer, scaler=scaler, output_dir=folder)
    start = resume(cfg, saver, model)
    saver.save_now(start.step - 1, samples_seen=start.samples_seen)
    saver.finish()
    saver.checkpointer.close()


def check(root, *, saving, loading):
    """Save with some numbers of processes and strategies, go on with others; {processes: strategies}."""
    run_on(1, train_alone, root=root)
    whole = losses_of(root / "whole")
    for num_processes, strategies in saving.items():
        run_on(num_processes, save_runs, root=root, strategies=strategies)
    sources = [f"{num_processes}_{strategy}" for num_processes, strategies in saving.items() for strategy in strategies]
    for num_processes, strategies in loading.items():
        run_on(num_processes, go_on_with, root=root, sources=sources, strategies=strategies)
    for source in sources:
        saved = contents(root / source)
        for num_processes, strategies in loading.items():
            for strategy in strategies:
                target = root / f"{source}_to_{num_processes}_{strategy}"
                found = StoredCheckpoint.open(target / "again", SAVED).manifest
                assert (found.world_size, found.sharding_strategy) == (num_processes, strategy)
                require_equal(contents(target / "again"), saved, where=target.name)
                torch.testing.assert_close(losses_of(target / "on"), whole[STOP:], rtol=1e-5, atol=0, msg=target.name)


def run_on(num_processes, function, *, root, **args):
    """Run a function of this file on forked ranks; one rank has no process group, as without torchrun."""
    run_distributed(function, num_processes=num_processes, args={"root": str(root), **args}, timeout_s=1200)


def train_alone(root):
    train(Path(root) / "whole", f"train.max_steps={STEPS}")


def contents(folder):
    """Read whole tensors and values of all networks and of the optimiser, by path."""
    stored = StoredCheckpoint.open(folder, SAVED)
    optimizer = stored.optimizer
    found = {name: pieces.read_all() for name, pieces in stored.model.items()}
    for param, values in optimizer["state"].items():
        for key, value in values.items():
            found[f"{param}/{key}"] = value.read_all() if isinstance(value, StoredPieces) else value
    assert {name.split(".")[0] for name in stored.model} >= {"student", "teacher"} and optimizer["state"]
    return found | {"groups": optimizer["param_groups"], "samples_seen": stored.extra["samples_seen"]}


def require_equal(found, saved, *, where):
    assert found.keys() == saved.keys(), where
    for path, value in saved.items():
        same = torch.equal(found[path], value) if isinstance(value, torch.Tensor) else found[path] == value
        assert same, (where, path)


def test_every_number_of_processes_goes_on_from_every_other(tmp_path):
    everywhere = {num_processes: ["FULL_SHARD"] for num_processes in (1, 2, 3, 4)}
    check(tmp_path, saving=everywhere, loading=everywhere)


def test_every_strategy_goes_on_from_every_other(tmp_path):
    check(tmp_path, saving={4: STRATEGIES}, loading={4: STRATEGIES})
