"""The program on two processes records, step by step, the losses of one process with the same global batch."""

import pytest
import torch
from support.training import DINOV3_RUN, losses_of, train, train_in_turns, train_on_ranks

COMMON = [
    "train.global_batch_size=16",
    "train.OFFICIAL_EPOCH_LENGTH=20",
    "student.drop_path_rate=0",
    "optim.scaling_rule=none",
    "optim.base_lr=0.001",
]
CASES = {
    "centering": ["train.centering=centering", "dino.koleo_loss_weight=0"],
    "sinkhorn": ["train.centering=sinkhorn_knopp", "ibot.separate_head=true", "dino.koleo_loss_distributed=true"],
    "workers": ["train.centering=sinkhorn_knopp", "dino.koleo_loss_weight=0", "train.num_workers=1"],
    "dinov3": [
        *DINOV3_RUN,
        "dino.koleo_loss_distributed=true",
        "dino.koleo_distributed_loss_group_size=4",
        "dino.koleo_topk=2",
        "dino.global_ignore_diagonal=false",
        "dino.reweight_dino_local_loss=true",
    ],
}
STRATEGIES = {"centering": "NO_SHARD", "sinkhorn": "SHARD_GRAD_OP", "workers": "FULL_SHARD", "dinov3": "FULL_SHARD"}


UNDER_TORCHRUN = "sinkhorn"


def options_of(case):
    return [*COMMON, *CASES[case], f"compute_precision.sharding_strategy={STRATEGIES[case]}"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    done = train_on_ranks(folder / UNDER_TORCHRUN, *options_of(UNDER_TORCHRUN))
    assert done.returncode == 0, done.stderr
    assert (folder / UNDER_TORCHRUN / "logs" / "log.txt.rank1").exists()
    train_in_turns([(folder / case, options_of(case)) for case in CASES if case != UNDER_TORCHRUN])
    return folder


@pytest.mark.integration
@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps(tmp_path, two_ranks, case):
    assert train(tmp_path, *options_of(case)) == 0
    one, two = losses_of(tmp_path), losses_of(two_ranks / case)
    assert len(one.unique()) == 20
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)
