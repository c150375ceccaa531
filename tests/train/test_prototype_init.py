"""Heads that start from the training images: what they keep of the features, and when a run does it."""

import pytest
import torch
import torch.nn.functional as F
from support.meta_arch import tiny_arch, tiny_config
from support.training import assert_equal, assert_same_state, train

from dinov2.errors import DatasetError
from dinov2.layers.dino_head import DINOHead
from dinov2.train.build import build_augmentation, build_dataset
from dinov2.train.prototype_init import main_axes, prototypes_from, start_head, start_heads
from dinov2.train.spherical_kmeans import nearest_centres, spherical_kmeans

CPU = torch.device("cpu")
KMEANS = ("dino.prototype_init=kmeans", "train.prototype_init_crops=40")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clustered(num_points=240, num_clusters=6, width=16, seed=0):
    """Unit vectors around random directions, and the number of each one's direction."""
    directions = F.normalize(torch.randn(num_clusters, width, generator=seeded(seed)), dim=1)
    labels = torch.arange(num_points) % num_clusters
    noise = torch.randn(num_points, width, generator=seeded(seed + 1))
    return F.normalize(directions[labels] + 0.05 * noise, dim=1), labels


def tilted(num_rows=300, width=48):
    """Features like a backbone's: a mean far from zero, and axes of very different lengths."""
    mix = torch.randn(width, width, generator=seeded(3)) * torch.logspace(1, -1, width)
    return torch.randn(num_rows, width, generator=seeded(4)) @ mix.T + 5


def test_kmeans_finds_clusters():
    points, labels = clustered()
    centres = spherical_kmeans(points, 24, generator=seeded(), device=CPU)
    assert centres.shape == (24, 16)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(24))
    found = nearest_centres(points, centres, device=CPU)
    assert len(found.unique()) > 6
    for centre in found.unique():  # no centre stands between two clusters
        assert len(labels[found == centre].unique()) == 1


def test_kmeans_of_equal_points_and_of_as_many_centres_as_points():
    same = F.normalize(torch.ones(5, 4), dim=1)
    torch.testing.assert_close(spherical_kmeans(same, 3, generator=seeded(), device=CPU), same[:3])
    points, _ = clustered(12)
    centres = spherical_kmeans(points, 12, generator=seeded(), device=CPU)
    assert (nearest_centres(points, centres, device=CPU).unique() == torch.arange(12)).all()


def test_main_axes_are_half_whitened():
    centred = tilted() - tilted().mean(0)
    axes = main_axes(centred)
    assert axes.shape == (48, 48)
    spread, before = (centred @ axes.T).std(0, correction=0), torch.linalg.svdvals(centred) / 300**0.5
    torch.testing.assert_close(spread, before.sqrt(), rtol=1e-3, atol=0)
    assert len(main_axes(centred[:, :1].expand(-1, 48) * 1.0)) == 1  # one axis holds all there is
    assert len(main_axes(torch.zeros(9, 4))) == 0


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_a_started_head_keeps_angles_and_its_size_of_weights(num_layers):
    head = DINOHead(48, 20, nlayers=num_layers, hidden_dim=100, bottleneck_dim=32)
    head.init_weights(seeded())
    sizes = [param.square().mean().sqrt() for name, param in head.mlp.named_parameters() if name.endswith("weight")]
    features = tilted()
    start_head(head, features, generator=seeded(), device=CPU)
    centred = features - features.mean(0)
    projected = F.normalize(centred @ main_axes(centred)[:32].T, dim=1)
    bottleneck = F.normalize(head.mlp(features), dim=1)
    torch.testing.assert_close(bottleneck @ bottleneck.T, projected @ projected.T, rtol=0, atol=1e-5)
    started = [param.square().mean().sqrt() for name, param in head.mlp.named_parameters() if name.endswith("weight")]
    for before, now in zip(sizes, started, strict=True):
        assert 0.5 < now / before < 1.5


def test_every_weight_of_a_started_head_learns():
    """Hidden units that take no part at first have zero outputs, not zero gradients."""
    head = DINOHead(48, 20, hidden_dim=100, bottleneck_dim=32)
    head.init_weights(seeded())
    start_head(head, tilted(), generator=seeded(), device=CPU)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        head(tilted()).logsumexp(dim=1).mean().backward()
        optimizer.step()
    for name, param in head.named_parameters():
        rows = param.grad.flatten(1) if param.ndim > 1 else param.grad.unsqueeze(1)
        assert (rows.abs().amax(dim=1) > 0).all(), name


@pytest.mark.parametrize("weight_norm", [True, False])
def test_prototypes_are_unit_centres(weight_norm):
    points, labels = clustered(width=16)
    head = DINOHead(16, 12, nlayers=1, bottleneck_dim=16, weight_norm=weight_norm)
    head.init_weights(seeded())
    start_head(head, points, generator=seeded(), device=CPU)
    prototypes = head.last_layer.prototypes()
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(12))
    random = DINOHead(16, 12, nlayers=1, bottleneck_dim=16, weight_norm=weight_norm)
    random.init_weights(seeded())
    random.last_layer.start_from(F.normalize(torch.randn(12, 16, generator=seeded(1)), dim=1))
    assert head(points).amax(dim=1).mean() > 0.85 > 0.6 > random(points).amax(dim=1).mean()
    of_each = [labels[head(points).argmax(dim=1) == number].unique() for number in range(12)]
    assert all(len(found) <= 1 for found in of_each)  # no prototype serves two kinds of images


def test_prototypes_that_images_do_not_suffice_for_are_copies_with_noise(caplog):
    caplog.set_level("INFO", logger="dinov2")
    points, _ = clustered(40)
    prototypes = prototypes_from(points, 100, generator=seeded(), device=CPU)
    assert prototypes.shape == (100, 16) and len(prototypes.unique(dim=0)) == 100
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(100))
    assert (prototypes @ points.T).amax(dim=1).min() > 0.8
    assert caplog.messages == [
        "prototypes=100 are more than a 4th of the features=40: 10 are centres of clusters, 90 copies of features with "
        "noise; fewer prototypes, or more train.prototype_init_crops, would do them better"
    ]


def test_heads_without_biases_or_with_batch_norm_are_refused():
    for options in ({"mlp_bias": False}, {"use_bn": True}):
        head = DINOHead(48, 20, hidden_dim=100, bottleneck_dim=32, **options)
        head.init_weights(seeded())
        with pytest.raises(ValueError, match="only an MLP with biases and without batch normalisation"):
            head.start_as_projection(torch.eye(48)[:4], torch.zeros(48))


def test_images_that_do_not_differ_are_an_error():
    head = DINOHead(48, 20, hidden_dim=100, bottleneck_dim=32)
    with pytest.raises(DatasetError) as caught:
        start_head(head, torch.ones(9, 48), generator=seeded(), device=CPU)
    assert str(caught.value) == (
        "prototype_init=kmeans: the backbone sees no difference between 9 crops of the training images; look at them, "
        "for they are empty or all the same"
    )


@pytest.mark.parametrize("separate", ["true", "false"])
def test_student_and_teacher_start_alike_and_global_random_numbers_stay(tmp_path, separate):
    options = [f"ibot.separate_head={separate}", "train.dataset_path=Digits:split=VAL"]
    model, cfg = tiny_arch(options), tiny_config(options)
    heads = [name for name in model.student if name != "backbone"]
    before = {name: tensor.clone() for name, tensor in model.student.state_dict().items()}
    random_state = torch.get_rng_state()
    start_heads(
        model,
        heads,
        build_dataset(cfg, output_dir=tmp_path),
        augmentation=build_augmentation(cfg),
        num_crops=70,
        seed=3,
        num_workers=0,
        device=CPU,
        on_bad_image="error",
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_equal(model.teacher.state_dict(), model.student.state_dict(), where="teacher")
    for name, tensor in model.student.state_dict().items():
        is_new = not name.startswith("backbone.") and name.endswith(("weight", "weight_v"))
        if is_new or name.startswith("backbone."):
            assert torch.equal(tensor, before[name]) != is_new, name


def test_a_run_starts_its_heads_once_and_resumes_bit_for_bit(tmp_path, caplog):
    caplog.set_level("INFO", logger="dinov2")
    assert train(tmp_path / "whole", *KMEANS) == 0
    assert "dino_head starts from 80 features of 40 crops" in caplog.messages
    assert train(tmp_path / "parts", *KMEANS, "train.max_steps=3") == 0
    caplog.clear()
    torch.manual_seed(123)
    assert train(tmp_path / "parts", *KMEANS) == 0
    assert not [message for message in caplog.messages if "starts from" in message]
    assert_same_state(tmp_path / "whole", tmp_path / "parts", name="model_0000005")


def test_heads_that_a_file_gives_stay_as_they_are(tmp_path, caplog):
    caplog.set_level("INFO", logger="dinov2")
    still = ("train.max_steps=1", "optim.base_lr=0", "optim.min_lr=0", "teacher.momentum_teacher=1")
    assert train(tmp_path / "first", "train.max_steps=1", "evaluation.at_start=true") == 0
    weights = tmp_path / "first" / "eval" / "start" / "teacher_checkpoint.pth"
    assert train(tmp_path / "next", *KMEANS, *still, f"student.pretrained_weights={weights}") == 0
    assert not [message for message in caplog.messages if "starts from" in message]
    given = torch.load(weights, weights_only=True)["teacher"]
    saved = torch.load(tmp_path / "next" / "model_0000000.rank_0.pth", weights_only=True)["model"]
    assert torch.equal(saved["student.dino_head.last_layer.weight_v"], given["dino_head.last_layer.weight_v"])
