"""Loading on another number of processes, and under another sharding strategy, than saved."""

import shutil
from pathlib import Path

import pytest
import torch
from support.dist import run_distributed
from support.toy_run import STRATEGIES, Run, same

from dinov2 import checkpoint_format, distributed, fsdp
from dinov2.checkpoint_format import StoredCheckpoint, StoredPieces

HYBRID_SIZE = {1: None, 2: 1, 3: None, 4: 2}  # ranks of a group, so that there is more than one


def whole_state(run):
    """Model and optimiser of a run with whole tensors, equal on all ranks."""
    optimizer = run.optimizer.state_dict()["state"]
    tensors = {name: value for name, value in run.model.state_dict().items()}
    tensors |= {f"{param}/{key}": value for param, values in optimizer.items() for key, value in values.items()}
    return {
        name: value.full_tensor() if isinstance(value, torch.distributed.tensor.DTensor) else value.clone()
        for name, value in tensors.items()
    }


def make(folder, strategy, seed=1):
    return Run(folder, strategy=strategy, seed=seed, hybrid=HYBRID_SIZE[distributed.get_world_size()])


def save_under(folder, strategies):
    """Save one checkpoint per strategy after equal steps; returns the whole state."""
    states = []
    for strategy in strategies:
        run = make(Path(folder) / strategy, strategy).train(3)
        states.append(whole_state(run))
    distributed.barrier()
    return {"states": states}


def load_under(folder, sources, strategies):
    """Load the checkpoints of other worlds; returns the whole states that came back."""
    found = {}
    for source in sources:
        for strategy in strategies:
            run = make(folder, strategy, seed=5)
            extra = run.checkpointer.load(str(Path(folder) / source / "model_0000002"))
            rng = torch.rand(3)
            found[f"{source} under {strategy}"] = {"state": whole_state(run), "extra": extra, "random": rng}
    return found


def check_matrix(folder, saving, loading):
    """Save under some worlds and strategies and load each under others; {processes: strategies}."""
    saved = {}
    for world_size, strategies in saving.items():
        args = {"folder": str(folder / str(world_size)), "strategies": strategies}
        states = run_distributed(save_under, num_processes=world_size, args=args)
        for number, strategy in enumerate(strategies):
            saved[f"{world_size}/{strategy}"] = states[0]["states"][number]
            assert all(same(rank["states"][number], states[0]["states"][number]) for rank in states)
    for world_size, strategies in loading.items():
        args = {"folder": str(folder), "sources": list(saved), "strategies": strategies}
        if world_size == 1:
            ranks = [load_under(**args)]
        else:
            ranks = run_distributed(load_under, num_processes=world_size, args=args)
        for rank, found in enumerate(ranks):
            assert len(found) == len(saved) * len(strategies)
            for name, loaded in found.items():
                assert same(loaded["state"], saved[name.split()[0]]), (world_size, rank, name)
                assert loaded["extra"] == {"iteration": 2, "note": "after 2"}
        for name in ranks[0]:  # ranks that are new draw numbers of their own
            drawn = {tuple(found[name]["random"].tolist()) for found in ranks[int(name[0]) :]}
            assert len(drawn) == max(world_size - int(name[0]), 0)
    for source in saved:
        require_each_tensor_once(folder / source, model=saved[source])


@pytest.mark.integration
@pytest.mark.dist
def test_every_number_of_processes_and_every_strategy_reads_every_other(tmp_path):
    few = ["NO_SHARD", "FULL_SHARD"]
    saving = {1: ["NO_SHARD"], 2: few, 3: few, 4: STRATEGIES}
    check_matrix(tmp_path, saving, {1: ["NO_SHARD"], 2: ["FULL_SHARD"], 3: few, 4: STRATEGIES})


@pytest.mark.integration
@pytest.mark.dist
def test_two_processes_write_what_one_and_three_read(tmp_path):
    check_matrix(tmp_path, {2: STRATEGIES}, {1: ["NO_SHARD"], 3: ["FULL_SHARD"]})


def require_each_tensor_once(folder, *, model):
    """All rows stand in one file alone; what several ranks hold is spread over them."""
    manifest = checkpoint_format.open_checkpoint(folder, "model_0000002")
    stored = StoredCheckpoint.open(folder, "model_0000002")
    assert manifest.global_batch_size == 12
    tensors = {name: pieces for name, pieces in stored.model.items()}
    for param, values in stored.optimizer["state"].items():
        tensors |= {f"{param}/{key}": value for key, value in values.items() if isinstance(value, StoredPieces)}
    assert len(tensors) == len(model)
    sizes = [0] * manifest.world_size
    for rank in range(manifest.world_size):
        data = torch.load(folder / f"model_0000002.rank_{rank}.pth", weights_only=True)
        held = [*data["model"].values()]
        held += [
            value for values in data["checkpointables"]["optimizer"]["state"].values() for value in values.values()
        ]
        sizes[rank] = sum(tensor.nbytes for tensor in held)
        assert len(held) == len(data["layout"])
    assert sum(sizes) == sum(tensor.nbytes for tensor in model.values())
    if folder.name == "NO_SHARD":
        assert max(sizes) - min(sizes) <= max(tensor.nbytes for tensor in model.values())
    for name, pieces in stored.model.items():
        assert same(pieces.read_all().clone(), model[name])
        if len(pieces.global_shape) == 2:
            assert same(pieces.read(1, 3).clone(), model[name][1:4])


def continue_with(folder, source):
    """Resume another world's run; returns the whole state after three more steps of equal samples on all ranks."""
    target = Path(folder) / f"continued_{distributed.get_world_size()}"
    if distributed.is_main_process():
        shutil.copytree(Path(folder) / source, target)
    distributed.barrier()
    run = make(target, "FULL_SHARD", seed=5)
    run.resume()
    files = sorted(path.name for path in target.iterdir()) if distributed.is_main_process() else []
    distributed.barrier()
    run.checkpointer.clean_up()
    run.checkpointer.save("model_0000002", iteration=2)  # fewer or more files under the same name
    return {"before": files, "after": sorted(path.name for path in target.iterdir()), "names": len(whole_state(run))}


@pytest.mark.integration
@pytest.mark.dist
def test_a_run_with_fewer_ranks_leaves_no_files_of_the_others(tmp_path):
    folder = tmp_path / "3"
    run_distributed(save_under, num_processes=3, args={"folder": str(folder), "strategies": ["FULL_SHARD"]})
    (folder / "FULL_SHARD" / "model_0000005.rank_2.pth").touch()  # killed while saving
    (folder / "FULL_SHARD" / "model_0000005.rank_1.pth.tmp").touch()
    ranks = run_distributed(continue_with, args={"folder": str(folder), "source": "FULL_SHARD"})
    tags = [f"last_checkpoint.rank_{rank}" for rank in range(3)]
    old = [f"model_0000002.rank_{rank}.pth" for rank in range(3)]
    assert ranks[0]["before"] == [
        *tags,
        "model_0000002.manifest.json",
        *old,
        *sorted(["model_0000005.rank_1.pth.tmp", "model_0000005.rank_2.pth"]),
    ]
    for rank in ranks:
        assert rank["after"] == [*tags[:2], "model_0000002.manifest.json", *old[:2]]


def test_a_new_rank_starts_random_numbers_of_its_own():
    state = checkpoint_format.to_plain(fsdp.RngState().state_dict())

    def draw(rank):
        fsdp.RngState().load_state_of_another(state, rank=rank)
        return torch.rand(2).tolist()

    assert draw(3) == draw(3) != draw(4)
