"""The program on two processes records, step by step, the losses of one process with the same global batch."""

import pytest
import torch
from support.training import losses_of, train, train_on_ranks

COMMON = [
    "train.global_batch_size=16",
    "train.OFFICIAL_EPOCH_LENGTH=20",
    "student.drop_path_rate=0",
    "optim.scaling_rule=none",
    "optim.base_lr=0.001",
]
CASES = {
    "NO_SHARD": ["train.centering=centering", "dino.koleo_loss_weight=0"],
    "SHARD_GRAD_OP": ["train.centering=sinkhorn_knopp", "ibot.separate_head=true", "dino.koleo_loss_distributed=true"],
    "FULL_SHARD": ["train.centering=sinkhorn_knopp", "dino.koleo_loss_weight=0", "train.num_workers=1"],
}


@pytest.mark.dist
@pytest.mark.parametrize("strategy", CASES)
def test_twenty_steps(tmp_path, strategy):
    options = [*COMMON, *CASES[strategy], f"compute_precision.sharding_strategy={strategy}"]
    assert train(tmp_path / "one", *options) == 0
    done = train_on_ranks(tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one.unique()) == 20
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)
