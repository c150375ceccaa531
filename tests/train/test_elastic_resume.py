"""A run goes on with another number of processes: the same samples in the same global batches, the same losses."""

import pytest
import torch
from support.training import ELASTIC_RUN, losses_of, metrics_of, train, train_in_turns, train_on_ranks

from dinov2.checkpoint_format import StoredCheckpoint

STEPS, STOP = 5, 3
# One start of the ranks for each number of them: processes before, processes after, sharding before, sharding after.
MOVES = {
    "1 to 2": (1, 2, "NO_SHARD", "FULL_SHARD"),
    "2 to 1": (2, 1, "SHARD_GRAD_OP", "NO_SHARD"),
    "4 to 3": (4, 3, "FULL_SHARD", "SHARD_GRAD_OP"),
}


def run(folder, *, processes, strategy, steps):
    options = [*ELASTIC_RUN, f"train.max_steps={steps}", f"compute_precision.sharding_strategy={strategy}"]
    if processes == 1:
        assert train(folder, *options) == 0
    else:
        train_in_turns([(folder, options)], num_processes=processes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder, processes=1, strategy="NO_SHARD", steps=STEPS)
    return losses_of(folder)


@pytest.mark.integration
@pytest.mark.dist
@pytest.mark.parametrize("move", MOVES)
def test_the_losses_go_on(tmp_path, whole, move):
    before, after, sharding_before, sharding_after = MOVES[move]
    # The batch of a process is what gives 12 images before; afterwards the checkpoint's 12 hold.
    run(tmp_path, processes=before, strategy=sharding_before, steps=STOP)
    run(tmp_path, processes=after, strategy=sharding_after, steps=STEPS)
    assert [row["current_batch_size"] for row in metrics_of(tmp_path)] == [12] * STEPS
    torch.testing.assert_close(losses_of(tmp_path), whole, rtol=1e-5, atol=0)


@pytest.mark.integration
@pytest.mark.dist
def test_a_number_of_processes_that_does_not_divide_is_told_which_do(tmp_path):
    assert train(tmp_path, *ELASTIC_RUN, "train.global_batch_size=null", "train.max_steps=1") == 0
    done = train_on_ranks(tmp_path, *ELASTIC_RUN, "train.global_batch_size=null", num_processes=5)
    assert done.returncode == 1  # torchrun's own
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error == (
        "error: the run to go on with has a global batch of 12 images, no multiple of 5 (ranks=5 x "
        "optim.gradient_accumulation_steps=1); use 1, 2, 3, 4, 6 or 12 processes, or set train.global_batch_size to "
        "10 or 15"
    )


@pytest.mark.integration
@pytest.mark.dist
def test_the_global_batch_is_kept_where_the_config_gives_that_of_a_process(tmp_path):
    options = [*ELASTIC_RUN, "train.global_batch_size=null", "train.batch_size_per_gpu=12"]
    assert train(tmp_path, *options, "train.max_steps=1") == 0
    train_in_turns([(tmp_path, [*options, "train.max_steps=2"])])
    assert [row["current_batch_size"] for row in metrics_of(tmp_path)] == [12, 12]


@pytest.mark.integration
@pytest.mark.dist
def test_one_process_starts_from_a_checkpoint_of_two(tmp_path):
    two, still = tmp_path / "two", ("optim.base_lr=0", "optim.min_lr=0", "teacher.momentum_teacher=1")
    train_in_turns([(two, [*ELASTIC_RUN, "compute_precision.sharding_strategy=FULL_SHARD", "train.max_steps=2"])])
    saved = StoredCheckpoint.open(two, "model_0000001").model

    state = f"train.resume_path={two}/model_0000001.rank_{{rank}}.pth"
    assert train(tmp_path / "state", *ELASTIC_RUN, state, *still, "train.max_steps=3") == 0
    assert [row["iteration"] for row in metrics_of(tmp_path / "state")] == [2]
    weights = f"MODEL.WEIGHTS={two}/model_0000001.rank_1.pth"
    assert train(tmp_path / "weights", *ELASTIC_RUN, weights, *still, "train.max_steps=1") == 0
    assert [row["iteration"] for row in metrics_of(tmp_path / "weights")] == [0]
    for folder, name in (("state", "model_0000002"), ("weights", "model_0000000")):
        started = StoredCheckpoint.open(tmp_path / folder, name).model
        for key in saved:
            assert torch.equal(saved[key].read_all(), started[key].read_all()), key
