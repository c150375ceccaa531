"""Collectives on two gloo processes, and their behaviour without a process group."""

import pytest
import torch
from support.dist import run_distributed

from dinov2 import distributed
from dinov2.errors import ConfigError, TrainingError


def collect_all():
    rank = distributed.get_rank()
    mine = torch.full((2, 3), float(rank + 1))
    leaf = torch.full((1, 2), float(rank + 1), requires_grad=True)
    (distributed.all_gather_cat_autograd(leaf).square().sum() * (rank + 1)).backward()

    def missing_file():
        raise ConfigError("train.dataset_path: no such folder")

    def broken():
        raise KeyError("x")

    errors = []
    for fn in (missing_file, broken):
        try:
            distributed.on_main_first(fn)
        except (ConfigError, TrainingError, KeyError) as error:
            errors.append(f"{type(error).__name__}: {error}")

    def broken_on_the_last_rank():
        if rank == 1:
            raise ConfigError("rank 1 sees no folder")
        return rank

    try:
        distributed.on_every_rank(broken_on_the_last_rank)
    except ConfigError as error:
        errors.append(str(error))
    distributed.barrier()
    return {
        "sum": distributed.all_reduce_sum(mine),
        "sum_of_transposed": distributed.all_reduce_sum(torch.arange(6.0).view(2, 3).t() * rank),
        "unchanged": mine,
        "mean": distributed.all_reduce_mean(mine),
        "max": distributed.all_reduce_max(mine),
        "bf16": distributed.all_reduce_sum(mine.bfloat16()),
        "cat": distributed.all_gather_cat(torch.tensor([rank, rank + 10])),
        "cat_bool": distributed.all_gather_cat(torch.tensor([rank == 0])),
        "varlen": distributed.all_gather_varlen(torch.full((rank * 3, 2), rank)),
        "varlen_empty": list(distributed.all_gather_varlen(torch.zeros(0, 4)).shape),
        "gradient": leaf.grad,
        "broadcast": distributed.broadcast_object({"from": rank}, src=1),
        "gathered": distributed.gather_objects(rank),
        "all_gathered": distributed.all_gather_objects(f"rank {rank}"),
        "on_main_first": distributed.on_main_first(lambda base: base + rank, 5),
        "on_every_rank": distributed.on_every_rank(lambda: rank + 5),
        "errors": errors,
        "ranks": [rank, distributed.get_world_size(), distributed.get_local_rank(), distributed.get_local_world_size()],
    }


@pytest.mark.dist
def test_collectives_agree_on_two_processes():
    first, second = run_distributed(collect_all, launcher="torchrun")
    for result in (first, second):
        assert torch.equal(result["sum"], torch.full((2, 3), 3.0))
        assert torch.equal(result["sum_of_transposed"], torch.arange(6.0).view(2, 3).t())
        assert torch.equal(result["mean"], torch.full((2, 3), 1.5))
        assert torch.equal(result["max"], torch.full((2, 3), 2.0))
        assert torch.equal(result["bf16"], torch.full((2, 3), 3.0, dtype=torch.bfloat16))
        assert result["cat"].tolist() == [0, 10, 1, 11]
        assert result["cat_bool"].tolist() == [True, False]
        assert result["varlen"].tolist() == [[1, 1]] * 3
        assert result["varlen_empty"] == [0, 4]
        assert result["broadcast"] == {"from": 1}
        assert result["all_gathered"] == ["rank 0", "rank 1"]
        assert result["on_main_first"] == 5
    assert torch.equal(first["unchanged"], torch.full((2, 3), 1.0))
    # loss of rank r is (r + 1) * sum of squares, so each leaf receives (1 + 2) * 2 * value
    assert torch.equal(first["gradient"], torch.full((1, 2), 6.0))
    assert torch.equal(second["gradient"], torch.full((1, 2), 12.0))
    assert first["gathered"] == [0, 1] and second["gathered"] is None
    assert first["on_every_rank"] == 5 and second["on_every_rank"] == 6
    assert first["errors"] == [
        "ConfigError: train.dataset_path: no such folder",
        "KeyError: 'x'",
        "rank 1 sees no folder",
    ]
    assert second["errors"] == [
        "ConfigError: train.dataset_path: no such folder",
        "TrainingError: rank 0 failed: KeyError: 'x'",
        "rank 1 sees no folder",
    ]
    assert first["ranks"] == [0, 2, 0, 2] and second["ranks"] == [1, 2, 1, 2]


def test_one_process_gets_its_input_back():
    tensor = torch.arange(3.0, requires_grad=True)
    for collective in (
        distributed.all_reduce_sum,
        distributed.all_reduce_mean,
        distributed.all_reduce_max,
        distributed.all_gather_cat,
        distributed.all_gather_cat_autograd,
        distributed.all_gather_varlen,
        distributed.broadcast_object,
    ):
        assert collective(tensor) is tensor
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.all_gather_objects("x") == ["x"]
    assert distributed.on_main_first(max, 2, 3) == 3
    assert distributed.on_every_rank(lambda: 4) == 4
    distributed.barrier()
    assert distributed.is_main_process() and distributed.get_global_size() == 1 and distributed.get_global_rank() == 0


def test_a_scalar_cannot_be_concatenated():
    with pytest.raises(ValueError, match="unsqueeze it first"):
        distributed.all_gather_cat(torch.tensor(1.0))
