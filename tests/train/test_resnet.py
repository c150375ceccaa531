"""ResNets as students: batch statistics of student and teacher, resuming, several processes."""

import itertools

import pytest
import torch
from support.meta_arch import tiny_arch
from support.training import assert_equal, assert_same_state, losses_of, metrics_of, train, train_in_turns

from dinov2.checkpoint_format import StoredCheckpoint
from dinov2.data import DataAugmentationDINO

RESNET = (
    "student.arch=resnet18",
    "student.embed_dim=null",
    "student.depth=null",
    "student.num_heads=null",
    "student.drop_path_rate=0",
    "student.layerscale=null",
    "ibot.loss_weight=0",
)


def statistics(networks):
    """Buffers by name, copied; a ResNet has no others than those of batch normalisation."""
    return {name: buffer.clone() for name, buffer in networks.named_buffers()}


@pytest.fixture
def model():
    return tiny_arch([*RESNET, "train.centering=sinkhorn_knopp"])


def batch(num_images=4, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "collated_global_crops": torch.randn(2 * num_images, 3, 64, 64, generator=generator),
        "collated_local_crops": torch.randn(3 * num_images, 3, 32, 32, generator=generator),
        "collated_masks": torch.zeros(2 * num_images, 16, dtype=torch.bool),
        "mask_indices_list": torch.empty(0, dtype=torch.int64),
        "masks_weight": torch.empty(0),
    }


def test_the_teacher_averages_parameters_and_copies_statistics(model):
    before = {name: param.clone() for name, param in model.teacher.named_parameters()}
    first = statistics(model.student)
    metrics = model.forward_backward(batch(), teacher_temp=0.06)
    assert "ibot_loss" not in metrics and all(value.isfinite() for value in metrics.values())
    with torch.no_grad():
        for param in model.student.parameters():
            param += 0.1 * param.grad
    assert all(torch.equal(first[name], value) for name, value in statistics(model.teacher).items())
    model.update_teacher(0.75)
    moved = statistics(model.student)
    assert all(not torch.equal(moved[name], first[name]) for name in first)
    assert all(torch.equal(moved[name], value) for name, value in statistics(model.teacher).items())
    student = dict(model.student.named_parameters())
    for name, param in model.teacher.named_parameters():
        torch.testing.assert_close(param, 0.75 * before[name] + 0.25 * student[name])


def test_the_teacher_sees_each_image_by_itself(model):
    images = batch()["collated_global_crops"]
    together = model.teacher["backbone"](images)
    alone = torch.cat([model.teacher["backbone"](image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.teacher["backbone"](images), together)  # nor does it remember them


def test_a_cancelled_step_leaves_the_statistics_of_the_step_before(tmp_path, monkeypatch):
    finish, steps = DataAugmentationDINO.finish, itertools.count()

    def poisoned(self, crops, seeds):
        finished = finish(self, crops, seeds)
        if next(steps) == 1:
            finished["collated_global_crops"][0, 0, 0, 0] = torch.nan
        return finished

    monkeypatch.setattr(DataAugmentationDINO, "finish", poisoned)
    assert train(tmp_path, *RESNET, "train.max_steps=2", "checkpointing.period=1") == 0
    before, after = (
        torch.load(tmp_path / f"model_{step:07d}.rank_0.pth", weights_only=True)["model"] for step in range(2)
    )
    assert metrics_of(tmp_path)[1]["total_loss"] is None
    assert_equal(before, after, where="model")


STEPS = ("train.OFFICIAL_EPOCH_LENGTH=3", "dino.koleo_loss_distributed=true")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    assert train(folder, *RESNET, *STEPS) == 0
    return folder


def test_three_steps_equal_two_a_stop_and_one_more(one_process, tmp_path):
    assert train(tmp_path, *RESNET, *STEPS, "train.max_steps=2") == 0
    assert train(tmp_path, *RESNET, *STEPS) == 0
    assert_same_state(one_process, tmp_path, name="model_0000002")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Train in turns: three steps; two, a stop and one more; one step whose ranks keep statistics of their own."""
    folder = tmp_path_factory.mktemp("two_ranks")
    shared = [*RESNET, *STEPS, "train.global_batch_size=12", "compute_precision.sharding_strategy=FULL_SHARD"]
    synced = [*shared, "student.sync_batchnorm=true"]
    train_in_turns(
        [
            (folder / "whole", synced),
            (folder / "parts", [*synced, "train.max_steps=2"]),
            (folder / "parts", synced),
            (folder / "alone", [*shared, "train.max_steps=1", "evaluation.eval_period_iterations=1"]),
        ]
    )
    return folder


@pytest.mark.integration
@pytest.mark.dist
def test_two_processes_with_synchronised_statistics_have_the_losses_of_one_and_resume(two_ranks, one_process):
    # Statistics of few images amplify float noise, and each step the noise of the steps before it.
    torch.testing.assert_close(losses_of(two_ranks / "whole"), losses_of(one_process), rtol=1e-3, atol=0)
    assert_same_state(two_ranks / "whole", two_ranks / "parts", name="model_0000002", num_ranks=2)


@pytest.mark.integration
@pytest.mark.dist
def test_statistics_of_single_ranks_are_averaged_and_saved(two_ranks):
    folder = two_ranks / "alone"
    model = StoredCheckpoint.open(folder, "model_0000000").model  # what all ranks hold is in one file
    names = [name for name in model if "running_" in name or "num_batches" in name]
    assert len(names) == 2 * 20 * 3  # student and teacher, 20 normalisations, mean, variance and count
    for name in names:
        of_teacher = model[name.replace("student.", "teacher.")]
        assert torch.equal(model[name].read_all(), of_teacher.read_all()), name
    teacher = torch.load(folder / "eval" / "training_0" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert torch.equal(teacher["backbone.bn1.running_var"], model["teacher.backbone.bn1.running_var"].read_all())
