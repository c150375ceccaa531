"""What must hold for the losses on any input."""

import pytest
import torch
import torch.nn.functional as F
from support.dist import run_distributed

from dinov2.distributed import get_rank, get_world_size
from dinov2.layers.dino_head import DINOHead
from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.assignments import sinkhorn


def naive_sinkhorn(scores, temperature, num_steps=3):
    q = torch.exp(scores.double() / temperature).T  # [K, N]
    q /= q.sum()
    for _ in range(num_steps):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_sinkhorn_equals_rewriting_the_matrix(temperature):
    scores = unit(40, 16) @ unit(24, 16, seed=1).T
    own = sinkhorn(scores.clone(), temperature=temperature).dense()
    torch.testing.assert_close(own.double(), naive_sinkhorn(scores, temperature), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinkhorn_is_not_rounded_by_autocast(dtype):
    scores = (unit(40, 16) @ unit(24, 16, seed=1).T).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        own = sinkhorn(scores, temperature=0.04).dense()
    assert torch.equal(own, sinkhorn(scores, temperature=0.04).dense())


def test_sinkhorn_uses_prototypes_evenly_and_rows_sum_to_one():
    own = sinkhorn(torch.randn(64, 8), temperature=0.5, num_steps=50).dense()
    torch.testing.assert_close(own.sum(1), torch.ones(64))
    torch.testing.assert_close(own.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "scores",
    [
        torch.ones(6, 12),  # duplicates
        torch.randn(1, 12),  # batch of 1
        torch.randn(6, 12) * 1e4,  # far apart
        torch.cat([torch.full((1, 12), 1e4), torch.full((5, 12), -1e4)]),  # rows far apart
        torch.randn(6, 12).bfloat16(),
    ],
    ids=["duplicates", "single", "large", "uneven", "bfloat16"],
)
def test_sinkhorn_stays_finite(scores):
    own = sinkhorn(scores.clone(), temperature=0.04).dense()
    assert torch.isfinite(own).all()
    torch.testing.assert_close(own.sum(1), torch.ones(len(scores)), rtol=1e-4, atol=1e-4)


def test_sinkhorn_of_no_rows_is_empty():
    assert sinkhorn(torch.empty(0, 12), temperature=0.04).dense().shape == (0, 12)


@pytest.mark.parametrize("num_local", [0, 1, 3])
@pytest.mark.parametrize("centering", ["softmax_center_teacher", "sinkhorn_knopp_teacher"])
@pytest.mark.parametrize("options", [{}, {"ignore_diagonal": False}, {"local_weight": 0.3}, {"local_weight": 0.0}])
def test_chunked_dino_loss_and_gradients_equal_the_dense_ones(num_local, centering, options, monkeypatch):
    monkeypatch.setattr("dinov2.loss.prototype_cross_entropy._BLOCK_BYTES", {"cpu": 4 * 24 * 5})  # several blocks
    num_images, loss = 7, DINOLoss(24)
    scores = unit(2 * num_images, 8, seed=2) @ unit(24, 8, seed=3).T
    teacher = getattr(loss, centering)(scores, 0.05)
    features = [unit((2 + num_local) * num_images, 8, seed=4).requires_grad_() for _ in range(2)]
    prototypes = [unit(24, 8, seed=5).requires_grad_() for _ in range(2)]

    criterion = loss.criterion(teacher, num_local_crops=num_local, **options)
    chunked, local_mean, global_mean = criterion(features[0], prototypes[0])
    both = teacher.dense().chunk(2)
    student = (features[1] @ prototypes[1].T).chunk(2 + num_local)
    ignore_diagonal = options.get("ignore_diagonal", True)
    num_global, num_local_pairs = 2 if ignore_diagonal else 4, 2 * num_local
    dense_global = loss(student[:2], both, ignore_diagonal=ignore_diagonal)
    dense_local = loss(student[2:], both) if num_local else torch.zeros(())
    dense = (dense_global + options.get("local_weight", 1.0) * dense_local) / (num_global + max(num_local_pairs, 1))

    torch.testing.assert_close(chunked, dense)
    torch.testing.assert_close(global_mean, dense_global / num_global)
    torch.testing.assert_close(local_mean, dense_local / max(num_local_pairs, 1))
    (3.0 * chunked).backward()
    (3.0 * dense).backward()
    torch.testing.assert_close(features[0].grad, features[1].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prototypes[0].grad, prototypes[1].grad, rtol=1e-4, atol=1e-6)


def test_chunked_ibot_loss_and_gradients_equal_the_dense_ones(monkeypatch):
    monkeypatch.setattr("dinov2.loss.prototype_cross_entropy._BLOCK_BYTES", {"cpu": 4 * 24 * 5})
    masks = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[2] = False
    num_masked, loss = int(masks.sum()), iBOTPatchLoss(24)
    teacher = loss.sinkhorn_knopp_teacher(unit(num_masked, 8, seed=1) @ unit(24, 8, seed=2).T, 0.05)
    weights = (1 / masks.sum(1).clamp_min(1))[masks.nonzero()[:, 0]]
    features = [unit(num_masked, 8, seed=3).requires_grad_() for _ in range(2)]
    prototypes = [unit(24, 8, seed=4).requires_grad_() for _ in range(2)]
    (chunked,) = loss.criterion(teacher, masks_weight=weights, num_images=6)(features[0], prototypes[0])
    dense = loss.forward_masked(features[1] @ prototypes[1].T, teacher.dense(), masks)
    torch.testing.assert_close(chunked, dense)
    chunked.backward()
    dense.backward()
    torch.testing.assert_close(features[0].grad, features[1].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prototypes[0].grad, prototypes[1].grad, rtol=1e-4, atol=1e-6)


def test_zero_masked_patches_give_zero_loss_and_zero_gradients():
    head = DINOHead(8, 24, hidden_dim=16, bottleneck_dim=4)
    head.init_weights(torch.Generator().manual_seed(0))
    loss = iBOTPatchLoss(24)
    for centering in ("sinkhorn_knopp_teacher", "softmax_center_teacher"):
        scores = head(torch.empty(0, 8)).detach()
        loss.update_center(scores)
        teacher = getattr(loss, centering)(scores, 0.05)
        (value,) = head(torch.empty(0, 8), loss.criterion(teacher, masks_weight=torch.empty(0), num_images=4))
        value.backward()
        assert value == 0
        assert all(torch.count_nonzero(param.grad) == 0 for param in head.parameters())
    loss.apply_center_update()
    assert torch.count_nonzero(loss.center) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_under_autocast_is_close_to_float32(dtype):
    head = DINOHead(8, 24, hidden_dim=16, bottleneck_dim=4)
    head.init_weights(torch.Generator().manual_seed(0))
    x, loss = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), DINOLoss(24)
    teacher = loss.sinkhorn_knopp_teacher(torch.randn(8, 24), 0.5)
    exact = head(x, loss.criterion(teacher, num_local_crops=0))[0]
    with torch.autocast("cpu", dtype=dtype):
        rough = head(x, loss.criterion(teacher, num_local_crops=0))[0]
    rough.backward()
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.02)  # 8 bits of mantissa
    assert all(torch.isfinite(param.grad).all() for param in head.parameters())


def test_a_cancelled_step_leaves_the_centre_and_several_batches_count_as_one():
    loss, scores = DINOLoss(4), torch.randn(6, 4)
    loss.update_center(scores)
    loss.discard_center_update()
    loss.apply_center_update()
    assert torch.count_nonzero(loss.center) == 0
    loss.update_center(scores[:2])
    loss.update_center(scores[2:])
    loss.apply_center_update()
    torch.testing.assert_close(loss.center, 0.1 * scores.mean(0, keepdim=True))


@pytest.mark.parametrize(
    "rows",
    [torch.ones(4, 8), torch.zeros(4, 8), torch.randn(1, 8), torch.randn(4, 8).bfloat16()],
    ids=["duplicates", "zeros", "single", "bfloat16"],
)
def test_koleo_stays_finite(rows):
    rows.requires_grad_()
    value = KoLeoLoss()(rows)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(rows.grad).all()


@pytest.mark.parametrize(("topk", "group_size"), [(1, None), (3, None), (1, 4), (2, 3), (3, 6)])
def test_koleo_within_groups_equals_one_distance_at_a_time(topk, group_size):
    rows = unit(12, 8).requires_grad_()
    value = KoLeoLoss(topk=topk, group_size=group_size)(rows)
    (gradient,) = torch.autograd.grad(value, rows)

    size, logs = group_size or 12, []
    for i in range(12):
        others = [j for j in range(i // size * size, i // size * size + size) if j != i]
        distances = torch.stack([(rows[i] - rows[j]).norm() for j in others])
        logs.append(distances.sort().values[:topk].log())
    expected = -torch.cat(logs).mean()
    torch.testing.assert_close(value, expected)
    # The loss divides rows by their length, 1, so its gradient has no part along them.
    (plain,) = torch.autograd.grad(expected, rows)
    torch.testing.assert_close(gradient, plain - (plain * rows).sum(1, keepdim=True) * rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("topk", "group_size"), [(1, 5), (3, 3), (12, None)])
def test_koleo_groups_that_do_not_fit_are_an_error(topk, group_size):
    size = group_size or 12
    with pytest.raises(
        ValueError, match=f"12 rows cannot be split into groups of {size} with {topk} neighbours for each"
    ):
        KoLeoLoss(topk=topk, group_size=group_size)(unit(12, 8))


def koleo_of_rank() -> list[dict]:
    """Losses and gradients of this rank's rows; groups larger, as large and smaller than what a rank holds."""
    results = []
    for topk, group_size in [(1, None), (3, None), (2, 6), (1, 4), (1, 2)]:
        rows = unit(12, 8).chunk(get_world_size())[get_rank()].requires_grad_()
        loss = KoLeoLoss(distributed=True, topk=topk, group_size=group_size)(rows)
        loss.backward()
        results.append({"loss": loss.detach(), "gradient": rows.grad})
    return results


@pytest.mark.dist
def test_koleo_of_two_ranks_equals_that_of_one():
    ranks = run_distributed(koleo_of_rank)
    for one, first, second in zip(koleo_of_rank(), *ranks, strict=True):
        torch.testing.assert_close((first["loss"] + second["loss"]) / 2, one["loss"])
        # A rank's gradients are of its own mean; averaged over ranks they are those of the whole mean.
        torch.testing.assert_close(torch.cat([first["gradient"], second["gradient"]]) / 2, one["gradient"])


def test_dino_loss_stays_finite_for_duplicates_and_a_batch_of_one():
    for features in (torch.ones(6, 8), torch.ones(3, 8)):
        features = F.normalize(features, dim=-1).requires_grad_()
        loss = DINOLoss(12)
        teacher = loss.sinkhorn_knopp_teacher(torch.ones(len(features) // 3 * 2, 12), 0.04)
        value, *_ = loss.criterion(teacher, num_local_crops=1)(features, unit(12, 8))
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(features.grad).all()
