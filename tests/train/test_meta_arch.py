"""`SSLMetaArch`: what holds for student and teacher whatever the settings, and one step against a plain twin."""

import pytest
import torch
from dense_step import dense_forward_backward
from support.meta_arch import random_batch, tiny_arch, tiny_config
from torch import nn

from dinov2.fsdp import FSDPCheckpointer
from dinov2.train.ssl_meta_arch import SSLMetaArch

MOVED = 0.1


def moved_arch(overrides=(), *, seed=0):
    """A model whose student has moved away from the teacher."""
    model = tiny_arch(overrides, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.student.parameters():
            param += MOVED * torch.randn(param.shape, generator=generator)
    return model


def copy_of(networks):
    return {name: tensor.clone() for name, tensor in networks.state_dict().items()}


def assert_equal(networks, expected):
    for name, tensor in networks.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_every_weight_is_set_at_the_start_and_depends_on_the_seed_alone():
    model = SSLMetaArch(tiny_config())
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.constant_(tensor, torch.nan)
    torch.manual_seed(17)
    model.init_weights(3)
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    assert_equal(model.teacher, copy_of(model.student))
    assert_equal(tiny_arch(seed=3).student, copy_of(model.student))


EVERY_OPTION = [
    "defaults=dinov3",
    "student.num_register_tokens=2",
    "student.mask_k_bias=true",
    "student.untie_cls_and_patch_norms=true",
    "student.untie_global_and_local_cls_norm=true",
    "student.ffn_layer=swiglu64",
    "student.norm_layer=rmsnorm",
]
NO_VIT = [f"student.{name}=null" for name in ("embed_dim", "depth", "num_heads")]
RESNET = ["student.arch=resnet18", *NO_VIT, "ibot.loss_weight=0"]


def arch_full_of_nonsense(options):
    """Build as training does, without memory at first; no value of this memory may last."""
    with torch.device("meta"):
        model = SSLMetaArch(tiny_config(options))
    model.prepare_for_distributed_training(
        torch.device("cpu"), strategy="SHARD_GRAD_OP", param_dtype=torch.float32, reduce_dtype=torch.float32
    )
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.constant_(tensor, torch.nan if tensor.is_floating_point() else -7)
    return model


@pytest.mark.parametrize("options", [EVERY_OPTION, RESNET], ids=["dinov3", "resnet"])
def test_first_weights_and_a_checkpoint_fill_all_memory(tmp_path, options):
    model, resumed = arch_full_of_nonsense(options), arch_full_of_nonsense(options)
    model.init_weights(3)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all() and not (tensor == -7).any(), name
    FSDPCheckpointer(model, str(tmp_path)).save("model_0000000", iteration=0)
    FSDPCheckpointer(resumed, str(tmp_path)).load(str(tmp_path / "model_0000000"))
    expected = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in (*resumed.named_parameters(), *resumed.named_buffers()):
        assert torch.equal(tensor, expected[name]), name


def test_the_teacher_stays_in_evaluation_mode_and_learns_nothing_by_itself():
    model = moved_arch()
    model.eval().train()
    assert all(module.training for module in model.student.modules())
    assert not any(module.training for module in model.teacher.modules())
    before = copy_of(model.teacher)
    model.forward_backward(random_batch(), teacher_temp=0.06)
    assert all(param.grad is None and not param.requires_grad for param in model.teacher.parameters())
    unused = [name for name, param in model.student.named_parameters() if param.requires_grad and param.grad is None]
    assert not unused
    assert_equal(model.teacher, before)


@pytest.mark.parametrize("momentum", [0.0, 0.75, 1.0])
def test_momentum_is_the_share_of_the_old_teacher(momentum):
    model = moved_arch(["ibot.separate_head=true"])
    student, teacher = copy_of(model.student), copy_of(model.teacher)
    model.update_teacher(momentum)
    assert_equal(model.student, student)
    if momentum in (0.0, 1.0):
        assert_equal(model.teacher, teacher if momentum else student)
        return
    for name, tensor in model.teacher.state_dict().items():
        torch.testing.assert_close(tensor, momentum * teacher[name] + (1 - momentum) * student[name])


def test_stochastic_depth_is_the_students_alone():
    model = moved_arch(["student.drop_path_rate=0.4", "student.layerscale=0.5"])
    images = random_batch()["collated_global_crops"]
    for networks, is_random in ((model.student, True), (model.teacher, False)):
        passes = [networks["backbone"](images, is_training=True)["x_norm_clstoken"] for _ in range(2)]
        assert torch.equal(*passes) is not is_random


@pytest.mark.parametrize(
    ("overrides", "absent"),
    [
        (["crops.local_crops_number=0"], None),
        (["ibot.loss_weight=0"], "ibot_loss"),
        (["dino.koleo_loss_weight=0"], "koleo_loss"),
        (["dino.loss_weight=0", "train.centering=sinkhorn_knopp"], None),
        (["ibot.separate_head=true", "train.centering=sinkhorn_knopp"], None),
        (["ibot.separate_head=true", "ibot.loss_weight=0"], "ibot_loss"),
    ],
)
def test_each_loss_can_be_left_out(overrides, absent):
    model = moved_arch(overrides)
    batch = random_batch()
    if "crops.local_crops_number=0" in overrides:
        del batch["collated_local_crops"]
    metrics = model.forward_backward(batch, teacher_temp=0.06)
    assert all(value.ndim == 0 and value.isfinite() and not value.requires_grad for value in metrics.values())
    assert absent not in metrics
    gradients = [param.grad for param in model.student.parameters() if param.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients) and any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize(
    ("overrides", "local_weight", "num_global_pairs"),
    [([], 1.0, 2), (["dino.global_ignore_diagonal=false"], 0.3, 4), (["crops.local_crops_number=1"], 0.0, 2)],
)
def test_the_total_is_the_weighted_sum_of_what_is_recorded(overrides, local_weight, num_global_pairs):
    weights = ["dino.loss_weight=0.5", "dino.koleo_loss_weight=0.2", "ibot.loss_weight=0.7"]
    model = moved_arch([*overrides, *weights])
    num_local_pairs = 2 * model.num_local_crops
    batch = random_batch(num_local=model.num_local_crops)
    recorded = model.forward_backward(batch, teacher_temp=0.06, dino_local_loss_weight=local_weight)
    dino = num_global_pairs * recorded["dino_global_crops_loss"]
    dino += local_weight * num_local_pairs * recorded["dino_local_crops_loss"]
    expected = 0.5 * dino / (num_global_pairs + num_local_pairs)
    expected += 0.2 * 2 * recorded["koleo_loss"] + 0.7 * recorded["ibot_loss"]
    torch.testing.assert_close(recorded["total_loss"], expected)
    assert recorded["dino_local_loss_weight"] == torch.tensor(local_weight)


def test_without_its_loss_the_ibot_head_is_not_built():
    separate = "ibot.separate_head=true"
    assert "ibot_head" in tiny_arch([separate]).student
    assert "ibot_head" not in tiny_arch([separate, "ibot.loss_weight=0"]).student


def test_a_batch_without_masked_patches_and_of_one_image():
    model = moved_arch()
    batch = random_batch(1)
    batch |= {"collated_masks": torch.zeros(2, 16, dtype=torch.bool)}
    batch |= {"mask_indices_list": torch.empty(0, dtype=torch.int64), "masks_weight": torch.empty(0)}
    metrics = model.forward_backward(batch, teacher_temp=0.06)
    assert all(value.isfinite() for value in metrics.values()) and metrics["ibot_loss"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_close_to_full(dtype):
    losses = {}
    for chosen in (torch.float32, dtype):
        model = moved_arch(["train.centering=sinkhorn_knopp"])
        model.autocast_dtype = chosen
        losses[chosen] = model.forward_backward(random_batch(), teacher_temp=0.06)["total_loss"]
        gradients = [param.grad for param in model.student.parameters()]
        assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(losses[dtype], losses[torch.float32], rtol=0.02, atol=0)  # 8 bits of mantissa


@pytest.mark.parametrize("separate", ["true", "false"])
def test_the_step_equals_a_plain_twin_that_materialises_every_matrix(separate):
    overrides = ["train.centering=sinkhorn_knopp", f"ibot.separate_head={separate}", "student.layerscale=0.5"]
    model, twin = moved_arch(overrides), moved_arch(overrides)
    loss = model.forward_backward(random_batch(), teacher_temp=0.06)["total_loss"]
    torch.testing.assert_close(loss, dense_forward_backward(twin, random_batch(), teacher_temp=0.06), rtol=1e-4, atol=0)
    for (name, param), expected in zip(model.student.named_parameters(), twin.student.parameters(), strict=True):
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(param.grad, expected.grad, rtol=1e-4, atol=1e-4 * scale, msg=name)
