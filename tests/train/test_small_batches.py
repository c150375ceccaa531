"""Queues of past images in the training step, and what the losses see where gradients are accumulated."""

import pytest
import torch
from support.meta_arch import random_batch, tiny_arch, tiny_config
from support.training import ELASTIC_RUN, assert_same_state, losses_of, train, train_in_turns

from dinov2.errors import ConfigError
from dinov2.loss.feature_queue import is_filled
from dinov2.train.build import plan_run

CPU = torch.device("cpu")
SINKHORN = ["train.centering=sinkhorn_knopp", "student.layerscale=0.5"]
QUEUES = [*SINKHORN, "train.sinkhorn_queue_size=8", "dino.koleo_queue_size=8"]
SMALL_HEAD = ("ibot.head_n_prototypes=32", "ibot.head_hidden_dim=32", "ibot.head_bottleneck_dim=16")
RUN = (*SINKHORN, "train.sinkhorn_queue_size=30", "dino.koleo_queue_size=20", "ibot.separate_head=true", *SMALL_HEAD)
LAST = "model_0000005"


def step(model, *seeds, is_good=True):
    """Passes of one optimiser step, without the optimiser; returns their metrics."""
    metrics = [model.forward_backward(random_batch(seed=seed), teacher_temp=0.06) for seed in seeds]
    model.apply_center_updates() if is_good else model.discard_center_updates()
    return metrics


def rows_of(model):
    return {name: queue.rows(CPU).clone() for name, queue in model.queues.items()}


def losses(metrics):
    return [value["total_loss"].item() for value in metrics]


def test_without_queues_each_pass_stands_alone():
    """Sinkhorn-Knopp and KoLeo see the images of one pass, those of all ranks, and nothing of earlier ones."""
    model = tiny_arch(SINKHORN)
    together = losses(step(model, 0, 1))
    assert together == [losses(step(tiny_arch(SINKHORN), seed))[0] for seed in (0, 1)]
    assert losses(step(model, 1, 0)) == together[::-1]
    assert not model.queues and not model.queues.state_dict()


@pytest.mark.parametrize("is_good", [True, False])
def test_with_queues_a_pass_sees_those_before_it_in_its_step_and_in_good_steps(is_good):
    model = tiny_arch(QUEUES)
    first, second = step(model, 0, 1, is_good=is_good)
    assert first["total_loss"] == tiny_arch(SINKHORN).forward_backward(random_batch(), teacher_temp=0.06)["total_loss"]
    for name in ("teacher_entropy", "koleo_loss", "ibot_loss"):
        alone = tiny_arch(SINKHORN).forward_backward(random_batch(seed=1), teacher_temp=0.06)[name]
        assert second[name] != alone, name
    # Nothing has been learned yet, so two passes in one step or in two make no difference.
    apart = tiny_arch(QUEUES)
    assert losses([first, second]) == losses([*step(apart, 0), *step(apart, 1)])
    third = tiny_arch(QUEUES if is_good else SINKHORN)
    if is_good:
        step(third, 0)
        step(third, 1)
    assert losses(step(model, 2)) == losses(step(third, 2))


def test_queues_hold_both_crops_of_the_newest_images_and_a_patch_of_each_masked_crop():
    model = tiny_arch(QUEUES)
    for seed in range(3):
        step(model, seed)
    rows = rows_of(model)
    assert {name: (len(queue), is_filled(queue).sum().item()) for name, queue in rows.items()} == {
        "cls": (16, 16),
        "patch": (16, 16),  # of 3 passes with 6 masked crops each
        "koleo": (16, 16),
    }
    for queue in rows.values():
        torch.testing.assert_close(queue.norm(dim=1), torch.ones(16))
    with torch.no_grad():
        tokens = model.teacher.backbone(random_batch(seed=2)["collated_global_crops"], is_training=True)
        cls = model.teacher.dino_head.mlp(tokens["x_norm_clstoken"])
    newest = torch.nn.functional.normalize(cls, dim=1).unflatten(0, (2, 4)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(rows["cls"][-8:], newest)


def test_nothing_masked_and_a_single_image_train_with_queues():
    model = tiny_arch(QUEUES)
    batch = random_batch(1)
    batch |= {"collated_masks": torch.zeros(2, 16, dtype=torch.bool)}
    batch |= {"mask_indices_list": torch.empty(0, dtype=torch.int64), "masks_weight": torch.empty(0)}
    for _ in range(2):
        metrics = model.forward_backward(batch, teacher_temp=0.06)
        assert all(value.isfinite() for value in metrics.values()) and metrics["ibot_loss"] == 0


def test_a_run_with_queues_resumes_bit_for_bit(tmp_path):
    options = (*RUN, "train.global_batch_size=12", "optim.gradient_accumulation_steps=3")
    assert train(tmp_path / "whole", *options) == 0
    assert train(tmp_path / "parts", *options, "train.max_steps=3") == 0
    assert train(tmp_path / "parts", *options) == 0
    assert_same_state(tmp_path / "whole", tmp_path / "parts", name=LAST)
    saved = torch.load(tmp_path / "whole" / f"{LAST}.rank_0.pth", weights_only=True)["checkpointables"]["queues"]
    assert {name: len(state["rows"]) for name, state in saved.items()} == {"cls": 60, "patch": 60, "koleo": 40}


def test_queues_can_be_turned_on_and_off_between_starts(tmp_path, caplog):
    caplog.set_level("INFO", logger="dinov2")
    assert train(tmp_path, *SINKHORN, "train.max_steps=1") == 0
    assert train(tmp_path, *QUEUES, "train.max_steps=2") == 0
    assert "model_0000000 holds no queues, which start empty" in caplog.messages
    assert train(tmp_path, *SINKHORN, "train.max_steps=3") == 0
    weights = f"MODEL.WEIGHTS={tmp_path}/model_0000002.rank_0.pth"
    assert train(tmp_path / "weights", *QUEUES, weights, "train.max_steps=1") == 0
    assert len(losses_of(tmp_path)) == 3


@pytest.mark.dist
def test_two_ranks_give_the_losses_of_one_and_go_on_as_one(tmp_path):
    options = [*ELASTIC_RUN, *RUN, "dino.prototype_init=kmeans", "ibot.prototype_init=kmeans"]
    options += ["train.prototype_init_crops=70", "compute_precision.sharding_strategy=FULL_SHARD"]
    train_in_turns([(tmp_path / "two", [*options, "train.max_steps=3"])])
    assert train(tmp_path / "two", *options) == 0
    assert train(tmp_path / "one", *options) == 0
    assert len(losses_of(tmp_path / "two")) == 6
    torch.testing.assert_close(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-4, atol=0)


def test_a_queue_for_koleo_that_holds_too_much_of_the_dataset_is_refused():
    cfg = tiny_config(["dino.koleo_queue_size=26", "train.batch_size_per_gpu=4"])
    with pytest.raises(ConfigError) as caught:
        plan_run(cfg, dataset_size=103, world_size=1)
    assert str(caught.value) == (
        "dino.koleo_queue_size=26 is more than a quarter of the 103 images of the dataset: too many would be pushed "
        "away from an earlier view of themselves; use at most 25"
    )
    assert plan_run(cfg, dataset_size=104, world_size=1).global_batch_size == 4


def test_a_queue_gives_several_neighbours_to_the_images_of_a_small_pass():
    options = ["dino.koleo_loss_distributed=true", "dino.koleo_topk=3", "train.batch_size_per_gpu=2"]
    with pytest.raises(ConfigError, match="dino.koleo_topk=3 needs groups of at least 4 images"):
        plan_run(tiny_config(options), dataset_size=100, world_size=1)
    assert plan_run(tiny_config([*options, "dino.koleo_queue_size=8"]), dataset_size=100, world_size=1)
