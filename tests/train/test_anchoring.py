"""`SSLMetaArch` held near frozen networks: which there are, what they add to the loss, and what stays as it was."""

import pytest
import torch
import torch.nn.functional as F
from support.meta_arch import random_batch, tiny_arch, tiny_config

from dinov2.loss import GramLoss
from dinov2.train.ssl_meta_arch import SSLMetaArch

GRAM = ("gram.use_loss=true", "gram.img_level=true")
OF_START = (*GRAM, "gram.ckpt=start", "gram.rep_update=false")
ANCHORS = ("anchor.cls_weight=0.5", "anchor.patch_weight=0.25")
LOUD = 0.2


def moved(overrides, *, seed=0):
    """A model whose student and teacher have moved away from the start, each elsewhere."""
    model = tiny_arch(overrides, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in (*model.student.parameters(), *model.teacher.parameters()):
            param += LOUD * torch.randn(param.shape, generator=generator)
    return model


def batch(**more):
    return random_batch() | {"seeds": torch.tensor([5, 6, 7, 8])} | more


def features(network, crops, masks=None):
    with torch.no_grad():
        return network(crops, masks=masks, is_training=True)


def step(model, images, **options):
    model.zero_grad()
    return model.forward_backward(images, teacher_temp=0.06, **options)


def gradients(model):
    return {name: param.grad.clone() for name, param in model.student.named_parameters() if param.grad is not None}


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ((), []),
        (("gram.ckpt=start", "gram.loss_weight=3"), []),
        (("anchor.cls_weight=1",), ["start"]),
        (OF_START, ["start"]),
        ((*OF_START, *ANCHORS), ["start"]),
        ((*GRAM, "gram.ckpt=start", *ANCHORS), ["start", "gram_teacher"]),
        ((*GRAM, "gram.ckpt=start"), ["gram_teacher"]),
        ((*GRAM, "gram.ckpt=other.pth", "gram.rep_update=false", *ANCHORS), ["start", "gram_teacher"]),
        ((*GRAM, "gram.it_load_ema_teacher=5"), ["gram_teacher"]),
        ((*GRAM, "gram.ema_teacher=true"), []),
    ],
)
def test_there_are_only_the_networks_that_are_needed(overrides, names):
    model = tiny_arch(overrides)
    assert list(model.anchoring.networks) == names
    assert model.state_dict().keys() >= {f"anchoring.networks.{name}.cls_token" for name in names}
    for network in model.anchoring.networks.values():
        assert not network.training and not any(param.requires_grad for param in network.parameters())
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, model.teacher.backbone.state_dict()[name])


def test_off_by_default_it_changes_no_bit():
    plain, off = tiny_arch(), tiny_arch(("anchor.max_tokens=3", "gram.ckpt=start"))
    assert plain.state_dict().keys() == off.state_dict().keys()
    one, two = step(plain, batch()), step(off, batch())
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not any("gram" in name or "anchor" in name for name in one)


def test_the_losses_are_those_of_a_plain_twin_and_their_weights_count():
    model = moved((*OF_START, *ANCHORS))
    images = batch()
    metrics = step(model, images, gram_loss_weight=2.0)
    crops, masks = images["collated_global_crops"], images["collated_masks"]
    student, start = features(model.student.backbone, crops, masks), features(model.anchoring.networks.start, crops)
    gram = GramLoss(remove_neg=False)(student["x_norm_patchtokens"], start["x_norm_patchtokens"])
    cls = (1 - F.cosine_similarity(student["x_norm_clstoken"], start["x_norm_clstoken"], dim=-1)).mean()
    distance = 1 - F.cosine_similarity(student["x_norm_patchtokens"], start["x_norm_patchtokens"], dim=-1)
    patch = torch.stack([row[~mask].mean() for row, mask in zip(distance, masks, strict=True)]).mean()
    torch.testing.assert_close(metrics["gram_loss"], gram)
    torch.testing.assert_close(metrics["anchor_cls_loss"], cls)
    torch.testing.assert_close(metrics["anchor_patch_loss"], patch)
    assert metrics["gram_loss_weight"] == 2.0

    plain = moved(())
    alone = step(plain, images)
    expected = alone["total_loss"] + 2 * gram + 0.5 * cls + 0.25 * patch
    torch.testing.assert_close(metrics["total_loss"], expected)


def test_a_student_at_the_start_is_not_pulled():
    model = tiny_arch((*OF_START, "anchor.cls_weight=1", "anchor.patch_weight=1"))
    images = batch()
    images["collated_masks"].fill_(False)  # nothing hidden, so the student sees what the frozen network sees
    images |= {"mask_indices_list": torch.empty(0, dtype=torch.int64), "masks_weight": torch.empty(0)}
    metrics = step(model, images)
    for name in ("gram_loss", "anchor_cls_loss", "anchor_patch_loss"):
        assert metrics[name].abs() < 1e-5, name


def test_pulling_lowers_the_distance():
    images = batch()
    model = moved((*OF_START, *ANCHORS, "dino.loss_weight=0.001", "ibot.loss_weight=0", "dino.koleo_loss_weight=0"))
    optimizer = torch.optim.Adam(model.student.parameters(), lr=5e-3)
    seen = []
    for _ in range(12):
        seen.append(step(model, images))
        optimizer.step()
    for name in ("gram_loss", "anchor_cls_loss", "anchor_patch_loss"):
        assert seen[-1][name] < 0.8 * seen[0][name], name


def test_gram_of_the_teacher_itself_compares_with_its_patches():
    model = moved((*GRAM, "gram.ema_teacher=true"))
    images = batch()
    metrics = step(model, images)
    crops = images["collated_global_crops"]
    student = features(model.student.backbone, crops, images["collated_masks"])["x_norm_patchtokens"]
    teacher = features(model.teacher.backbone, crops)["x_norm_patchtokens"]
    torch.testing.assert_close(metrics["gram_loss"], GramLoss(remove_neg=False)(student, teacher))


def test_larger_crops_are_seen_by_the_gram_teacher_alone():
    model = moved((*OF_START, *ANCHORS))
    large = torch.randn(8, 3, 112, 112, generator=torch.Generator().manual_seed(3))
    metrics, plain = step(model, batch(collated_gram_teacher_crops=large)), step(model, batch())
    assert metrics["gram_loss"] != plain["gram_loss"]
    for name in ("anchor_cls_loss", "anchor_patch_loss"):
        assert torch.equal(metrics[name], plain[name])


def test_losses_without_weight_are_not_computed_unless_statistics_are_asked_for():
    model = moved(OF_START)
    assert "gram_loss" not in step(model, batch(), gram_loss_weight=0.0)
    assert "gram_loss" not in step(model, batch(), freeze_backbone=True)
    watched = moved((*OF_START, "gram.compute_stats=true"))
    metrics = step(watched, batch(), gram_loss_weight=0.0)
    assert metrics["gram_loss"] > 0 and metrics["gram_loss_weight"] == 0
    plain = moved(())
    step(plain, batch())
    for (name, one), two in zip(gradients(watched).items(), gradients(plain).values(), strict=True):
        assert torch.equal(one, two), name


def test_a_gram_teacher_that_waits_begins_with_the_teacher_of_its_step():
    model = moved((*GRAM, "gram.it_load_ema_teacher=5", "gram.rep_update=false"))
    frozen, teacher = model.anchoring.networks.gram_teacher, model.teacher.backbone
    assert "gram_loss" not in step(model, batch())
    model.begin_step(4)
    assert "gram_loss" not in step(model, batch())
    assert not torch.equal(frozen.cls_token, teacher.cls_token)
    model.begin_step(5)
    assert torch.equal(frozen.cls_token, teacher.cls_token)
    assert step(model, batch())["gram_loss"] > 0
    before = frozen.cls_token.clone()
    model.update_teacher(0.5)
    model.begin_step(6)
    assert torch.equal(frozen.cls_token, before) and not torch.equal(teacher.cls_token, before)


def test_a_resumed_run_knows_that_its_gram_teacher_does_not_wait_any_more():
    model = moved((*GRAM, "gram.it_load_ema_teacher=5"))
    model.begin_step(9)
    assert "gram_loss" in step(model, batch())


def test_a_gram_teacher_is_renewed_in_its_period_and_the_start_never():
    options = (*GRAM, *ANCHORS, "gram.ckpt=start", "gram.update_frequency=2", "gram.max_updates=1")
    model = moved(options)
    start = {name: tensor.clone() for name, tensor in model.anchoring.networks.start.state_dict().items()}
    renewed = []
    for number in range(6):
        model.begin_step(number)
        step(model, batch())
        renewed.append(torch.equal(model.anchoring.networks.gram_teacher.cls_token, model.teacher.backbone.cls_token))
        model.update_teacher(0.9)
    assert renewed == [False, False, True, False, False, False]
    for name, tensor in model.anchoring.networks.start.state_dict().items():
        assert torch.equal(tensor, start[name])


def test_only_patches_that_the_student_sees_are_anchored():
    model = moved(("anchor.patch_weight=1", "anchor.max_tokens=4"))
    images = batch()
    masks = images["collated_masks"]
    metrics = step(model, images)
    student = features(model.student.backbone, images["collated_global_crops"], masks)["x_norm_patchtokens"]
    start = features(model.anchoring.networks.start, images["collated_global_crops"])["x_norm_patchtokens"]
    distance = 1 - F.cosine_similarity(student, start, dim=-1)
    low = torch.stack([row[~mask].min() for row, mask in zip(distance, masks, strict=True)]).mean()
    high = torch.stack([row[~mask].max() for row, mask in zip(distance, masks, strict=True)]).mean()
    assert low < metrics["anchor_patch_loss"] < high


def test_frozen_networks_are_filled_on_the_meta_device_too():
    with torch.device("meta"):
        model = SSLMetaArch(tiny_config(OF_START))
    model.prepare_for_distributed_training(
        torch.device("cpu"), strategy="NO_SHARD", param_dtype=torch.float32, reduce_dtype=torch.float32
    )
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
    model.init_weights(0)
    assert all(param.isfinite().all() for param in model.anchoring.parameters())
    assert torch.equal(model.anchoring.networks.start.cls_token, model.teacher.backbone.cls_token)


def test_half_precision_gives_nearly_the_same():
    exact, rough = moved((*OF_START, *ANCHORS)), moved((*OF_START, *ANCHORS))
    rough.autocast_dtype = torch.bfloat16
    one, two = step(exact, batch()), step(rough, batch())
    for name in ("gram_loss", "anchor_cls_loss", "anchor_patch_loss"):
        torch.testing.assert_close(one[name], two[name], rtol=0.05, atol=5e-3)  # bfloat16 has 8 bits
