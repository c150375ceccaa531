"""Queues of past images: what they hold, and that Sinkhorn-Knopp and KoLeo see past images as if the pass had them."""

import pytest
import torch
import torch.nn.functional as F
from support.dist import run_distributed

from dinov2.distributed import get_rank, get_world_size
from dinov2.loss import KoLeoLoss
from dinov2.loss.assignments import sinkhorn
from dinov2.loss.feature_queue import FeatureQueue, FeatureQueues, is_filled, one_patch_of_each_crop, score_with_past

CPU = torch.device("cpu")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled_rows(queue):
    rows = queue.rows(CPU)
    return rows[is_filled(rows)]


def by_image(crop_major):
    return crop_major.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def test_the_newest_images_are_kept_oldest_first():
    queue, passes = FeatureQueue(5), [unit(4, 8, seed=seed) for seed in range(4)]
    assert queue.rows(CPU) is None
    queue.push(passes[0])
    assert queue.rows(CPU).shape == (10, 8)
    assert torch.equal(filled_rows(queue), by_image(passes[0]))
    for rows in passes[1:]:
        queue.push(rows)
    assert torch.equal(queue.rows(CPU), torch.cat([by_image(rows) for rows in passes])[-10:])


def test_crops_with_nothing_to_give_take_no_place():
    queue, rows = FeatureQueue(3), unit(4, 8)
    rows[1] = 0
    for _ in range(2):
        queue.push(rows)
    given = by_image(rows)[by_image(rows).abs().sum(1) > 0]
    assert torch.equal(queue.rows(CPU), torch.cat([given, given]))


def test_a_pass_larger_than_the_queue_leaves_its_last_images():
    queue = FeatureQueue(2)
    queue.push(unit(10, 8))
    assert torch.equal(queue.rows(CPU), by_image(unit(10, 8))[-4:])


def test_a_cancelled_step_leaves_no_rows():
    queue = FeatureQueue(3)
    queue.push(unit(2, 8))
    queue.keep()
    kept = queue.rows(CPU).clone()
    for seed in (1, 2):
        queue.push(unit(2, 8, seed=seed) * torch.nan)
    queue.discard()
    assert torch.equal(queue.rows(CPU), kept)


@pytest.mark.parametrize(
    ("size", "expected"), [(2, [2, 3, 4, 5]), (3, [0, 1, 2, 3, 4, 5]), (4, [None] * 2 + [*range(6)])]
)
def test_state_goes_to_a_queue_of_any_size(size, expected):
    queue, again = (FeatureQueues.of_sizes({"cls": length, "patch": 0}) for length in (3, size))
    for _ in range(2):
        queue["cls"].push(unit(6, 8))
    queue.keep()
    again.load_state_dict(queue.state_dict())
    rows = by_image(unit(6, 8))
    wanted = [torch.zeros(8) if row is None else rows[row] for row in expected]
    assert torch.equal(again["cls"].rows(CPU), torch.stack(wanted))
    FeatureQueues.of_sizes({"koleo": 2}).load_state_dict(queue.state_dict())  # what this run has not is left aside


def test_state_before_the_first_push_is_empty():
    queue = FeatureQueues.of_sizes({"cls": 3})
    again = FeatureQueues.of_sizes({"cls": 3})
    again.load_state_dict(queue.state_dict())
    assert again["cls"].rows(CPU) is None


def test_past_rows_take_part_in_sinkhorn_as_rows_of_the_pass_do():
    features, prototypes = unit(14, 16), unit(24, 16, seed=1)
    whole = sinkhorn(features @ prototypes.T, temperature=0.06).dense()
    past = features[6:] @ prototypes.T, torch.ones(8, dtype=torch.bool)
    own = sinkhorn(features[:6] @ prototypes.T, temperature=0.06, past=past)
    assert len(own) == 6
    torch.testing.assert_close(own.dense(), whole[:6])


@pytest.mark.parametrize("num_rows", [0, 6])
def test_empty_rows_of_a_queue_change_nothing(num_rows):
    features, prototypes = unit(num_rows, 16), unit(24, 16, seed=1)
    scores = features @ prototypes.T - 1e4  # far below those of an empty row, 0
    past = torch.zeros(5, 24), torch.zeros(5, dtype=torch.bool)
    own = sinkhorn(scores.clone(), temperature=0.06, past=past).dense()
    assert own.isfinite().all()
    torch.testing.assert_close(own, sinkhorn(scores, temperature=0.06).dense())


def test_a_queue_keeps_a_small_pass_from_spreading_over_all_prototypes():
    """Alone, an image is shared out evenly, whatever it shows; beside others it gets the prototypes it is like."""
    prototypes, image = unit(16, 8), unit(16, 8)[:1]
    alone = sinkhorn(image @ prototypes.T, temperature=0.1, num_steps=10).dense()
    torch.testing.assert_close(alone, torch.full((1, 16), 1 / 16))
    queue = FeatureQueue(64)
    queue.push(unit(128, 8, seed=1))
    _, scores, past = score_with_past(queue)(image, prototypes)
    assert sinkhorn(scores, temperature=0.1, num_steps=10, past=past).dense()[0, 0] > 0.5


def test_one_patch_of_each_crop_is_a_masked_one_of_it():
    masks = torch.rand(8, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[2] = False
    place = masks.nonzero().float()  # [M, 2]: crop and patch of each row
    chosen = one_patch_of_each_crop(place + 1, masks, first_image=0)
    for crop, row in enumerate(chosen.tolist()):
        assert row == [0, 0] if crop == 2 else row[0] - 1 == crop and masks[crop, int(row[1]) - 1]
    assert len({row[1] for row in chosen.tolist()}) > 3
    empty = one_patch_of_each_crop(torch.empty(0, 2), torch.zeros_like(masks), first_image=0)
    assert torch.equal(empty, torch.zeros(8, 2))


@pytest.mark.parametrize(("topk", "group_size"), [(1, None), (3, None), (2, 2)])
def test_koleo_with_past_images_equals_one_distance_at_a_time(topk, group_size):
    queue = FeatureQueue(4)
    loss = KoLeoLoss(topk=topk, group_size=group_size, past=queue)
    loss.remember(3 * unit(6, 8, seed=1))  # less than the queue holds
    rows = unit(4, 8).requires_grad_()
    value = loss(rows)
    (gradient,) = torch.autograd.grad(value, rows)

    size, logs = group_size or 4, []
    for i in range(4):
        others = [rows[j] for j in range(i // size * size, i // size * size + size) if j != i]
        distances = torch.stack([(rows[i] - other).norm() for other in (*others, *unit(6, 8, seed=1))])
        logs.append(distances.sort().values[:topk].log())
    expected = -torch.cat(logs).mean()
    torch.testing.assert_close(value, expected)
    (plain,) = torch.autograd.grad(expected, rows)
    torch.testing.assert_close(gradient, plain - (plain * rows).sum(1, keepdim=True) * rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("topk", "num_places"), [(2, 2), (8, 4)])  # 2 images and 2 rows of the queue
def test_koleo_of_fewer_images_than_neighbours_counts_those_that_there_are(topk, num_places):
    loss, rows = KoLeoLoss(topk=topk, past=FeatureQueue(1)), unit(2, 8).requires_grad_()
    (loss(rows) * num_places).backward()  # the queue is empty: one neighbour each
    distance = (rows[0] - rows[1]).norm()
    torch.testing.assert_close(loss(rows) * num_places, -distance.log())
    assert rows.grad.isfinite().all()
    loss.remember(unit(2, 8, seed=1))
    assert loss(rows) != 0


def test_koleo_of_a_single_image_needs_a_past():
    queue = FeatureQueue(4)
    loss, row = KoLeoLoss(past=queue), unit(1, 8).requires_grad_()
    assert loss(row) == 0
    queue.push(torch.zeros(2, 8))  # no crop had anything to give
    assert loss(row) == 0
    loss.remember(unit(2, 8, seed=1))
    torch.testing.assert_close(loss(row), -(row - unit(2, 8, seed=1)).norm(dim=1).min().log())
    loss(row).backward()
    assert row.grad.isfinite().all() and row.grad.abs().max() > 0


def three_passes_of_rank() -> dict:
    """Rows of the queue, assignments and KoLeo loss of this rank, with queues filled by two passes of 4 images."""
    queue, past = FeatureQueue(5), FeatureQueue(5)
    loss, prototypes = KoLeoLoss(distributed=True, past=past), unit(24, 8, seed=9)
    for seed in range(3):
        mine = unit(2, 4, 8, seed=seed).chunk(get_world_size(), dim=1)[get_rank()].flatten(0, 1)  # [2 * B, D]
        _, scores, before = score_with_past(queue)(mine, prototypes)
        assigned = sinkhorn(scores, temperature=0.06, past=before).dense()
        queue.push(mine)
        koleo = loss(mine.chunk(2)[0])
        loss.remember(mine)
    masks = (torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.4).chunk(get_world_size(), dim=1)
    mine = masks[get_rank()].flatten(0, 1)
    places = torch.arange(1, 10).expand(len(mine), -1)[mine].unsqueeze(1).float()
    patches = one_patch_of_each_crop(places, mine, first_image=get_rank() * len(mine) // 2)
    return {
        "queue": queue.rows(CPU),
        "assigned": assigned.unflatten(0, (2, -1)),
        "koleo": koleo,
        "patches": patches.unflatten(0, (2, -1)),
    }


@pytest.mark.dist
def test_queues_of_two_ranks_equal_that_of_one():
    one, ranks = three_passes_of_rank(), run_distributed(three_passes_of_rank)
    for rank in ranks:
        assert torch.equal(rank["queue"], one["queue"])
    torch.testing.assert_close(torch.cat([rank["assigned"] for rank in ranks], dim=1), one["assigned"])
    assert torch.equal(torch.cat([rank["patches"] for rank in ranks], dim=1), one["patches"])
    torch.testing.assert_close((ranks[0]["koleo"] + ranks[1]["koleo"]) / 2, one["koleo"])
