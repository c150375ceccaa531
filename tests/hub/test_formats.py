"""State dicts are recognised under any wrapper and prefix, and nothing of a backbone is lost on the way."""

from dataclasses import replace

import pytest
import torch
from support.backbones import LEARNED, REGISTERS, ROPE
from support.formats import read, shapes_of, stored, unread
from torchvision.models import resnet18

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import describe_architecture
from dinov2.hub.formats import from_official, to_official
from dinov2.layers.dino_head import DINOHead
from dinov2.models.vision_transformer import DinoVisionTransformer

FAMILIES = {"learned": LEARNED, "registers": REGISTERS, "rope": ROPE}


def backbone(family="learned", **changes):
    return DinoVisionTransformer(**FAMILIES[family] | changes).state_dict()


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def chunked(state):
    return {
        name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): tensor
        for name, tensor in state.items()
    }


def convert(state, **kwargs):
    return to_official(stored(state), path="w.pth", **kwargs)


def assert_equal(converted, want):
    got = read(converted)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


WRAPPED = {
    "bare": dict,
    "module": lambda state: prefixed(state, "module."),
    "nested": lambda state: prefixed(state, "module._orig_mod.teacher.backbone._orig_mod."),
    "encoder": lambda state: prefixed(state, "model.image_encoder.vit."),
    "compiled blocks": lambda state: {name.replace("1.norm1", "1._orig_mod.norm1"): v for name, v in state.items()},
    "sharded": lambda state: {
        f"backbone._fsdp_wrapped_module.{name.replace('.attn', '._checkpoint_wrapped_module.attn')}": tensor
        for name, tensor in state.items()
    },
    "chunks": lambda state: prefixed(chunked(state), "backbone."),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_official_names_are_found_under_any_wrapper(wrapper, family):
    state = backbone(family)
    converted = convert(WRAPPED[wrapper](state))
    assert_equal(converted.state, state)
    assert (converted.converted, converted.unused, converted.heads, converted.implied) == ((), (), {}, {})
    assert converted.naming == ("DINOv3" if family == "rope" else "DINOv2")


@pytest.mark.parametrize("weight_norm", [True, False])
def test_heads_beside_the_backbone_are_kept_apart(weight_norm):
    module = DINOHead(48, 64, hidden_dim=16, bottleneck_dim=8, weight_norm=weight_norm)
    module.init_weights()
    head = module.state_dict()
    other = {name: tensor + 1 for name, tensor in head.items()}
    state = prefixed(backbone(), "backbone.") | prefixed(head, "dino_head.") | prefixed(other, "ibot_head.")
    for prefix in ("", "module.", "teacher."):
        converted = convert(prefixed(state, prefix) | {f"{prefix}dino_loss.center": torch.ones(2)})
        assert_equal(converted.state, backbone_of(state))
        assert_equal(converted.heads["dino_head"], head)
        assert_equal(converted.heads["ibot_head"], other)
        assert converted.unused == (f"{prefix}dino_loss.center",)


def backbone_of(state):
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items() if name.startswith("backbone.")}


def test_weight_norm_has_one_spelling():
    head = {
        "mlp.0.weight": torch.ones(2, 2),
        "last_layer.weight_g": torch.ones(4, 1),
        "last_layer.weight_v": torch.ones(4, 2),
    }
    spelled = {
        "dino_head.mlp.0.weight": head["mlp.0.weight"],
        "dino_head.last_layer.parametrizations.weight.original0": head["last_layer.weight_g"],
        "dino_head.last_layer.parametrizations.weight.original1": head["last_layer.weight_v"],
    }
    assert_equal(convert(prefixed(backbone(), "backbone.") | spelled).heads["dino_head"], head)
    dino = {f"head.{name}": tensor for name, tensor in head.items()}
    assert_equal(convert(prefixed(backbone(), "backbone.") | dino).heads["dino_head"], head)


def test_the_network_asked_for_is_taken():
    teacher = backbone()
    student = {name: tensor + 1 for name, tensor in teacher.items()}
    both = prefixed(student, "student.backbone.") | prefixed(teacher, "teacher.backbone.")
    both |= prefixed(teacher, "gram_teacher.backbone.")
    assert_equal(convert(both).state, teacher)
    assert_equal(convert(both, network="student").state, student)
    assert set(convert(both).unused) == {name for name in both if not name.startswith("teacher.")}
    only_student = prefixed(student, "student.backbone.")
    assert_equal(convert(only_student).state, student)
    with pytest.raises(CheckpointError) as caught:
        convert(only_student, network="teacher")
    assert str(caught.value) == "w.pth: has no 'teacher' but has 'student'; take that one with --checkpoint-key student"


def test_dino_without_a_v2_is_named_so():
    state = backbone(init_values=None)
    del state["mask_token"]
    assert convert(state).naming == "DINO"


@pytest.mark.parametrize("spelling", ["attn.{}_proj.", "attn.{}."])
def test_separate_queries_keys_and_values_are_joined(spelling):
    state = backbone()
    apart = dict(state)
    for name in [name for name in state if ".attn.qkv." in name]:
        for letter, part in zip("qkv", apart.pop(name).chunk(3), strict=True):
            apart[name.replace("attn.qkv.", spelling.format(letter))] = part
    converted = convert(apart)
    assert_equal(converted.state, state)
    assert set(converted.converted) == {name for name in state if ".attn.qkv." in name}
    keyless = {name: tensor for name, tensor in apart.items() if not name.endswith(spelling.format("k") + "bias")}
    bias = convert(keyless).state["blocks.1.attn.qkv.bias"].read()
    q, _, v = state["blocks.1.attn.qkv.bias"].chunk(3)
    assert torch.equal(bias, torch.cat([q, torch.zeros(48), v]))
    del apart[f"blocks.1.{spelling.format('v')}weight"]
    with pytest.raises(CheckpointError) as caught:
        convert(apart)
    assert str(caught.value) == (
        f"w.pth: has blocks.1.{spelling.format('q')}weight but no {spelling.format('v')}weight beside it, "
        "which together are blocks.1.attn.qkv.weight"
    )


def test_two_names_of_one_tensor_are_refused():
    state = backbone()
    state["blocks.1.0.norm1.weight"] = torch.ones(48)
    with pytest.raises(CheckpointError) as caught:
        convert(state)
    assert str(caught.value) == (
        "w.pth: both blocks.0.norm1.weight and blocks.1.0.norm1.weight would be blocks.0.norm1.weight"
    )
    with pytest.raises(CheckpointError, match="^w.pth: both blocks.1.attn.qkv.bias and blocks.1.attn.q.bias would be "):
        convert(backbone() | {"blocks.1.attn.q.bias": torch.ones(48)})


@pytest.mark.parametrize("target", ["timm", "hf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes_out_comes_back_bit_for_bit(target, dtype):
    state = {name: tensor.to(dtype) for name, tensor in backbone(ffn_layer="swiglufused").items()}
    architecture = replace(describe_architecture(state), num_heads=4)
    out, config = from_official(stored(state), target=target, architecture=architecture)
    assert config.get("dtype", "none") == {"timm": "none", "hf": str(dtype).removeprefix("torch.")}[target]
    back = convert(read(out))
    if target == "timm":
        del state["mask_token"]
    assert_equal(back.state, state)
    assert all(tensor.dtype == dtype for tensor in read(back.state).values())


def test_other_names_of_layer_scale():
    state = backbone()
    for spelling in ("ls{}.weight", "gamma_{}"):
        renamed = dict(state)
        for name in [name for name in state if ".ls" in name]:
            number = name.split(".ls")[1][0]
            renamed[name.replace(f"ls{number}.gamma", spelling.format(number))] = renamed.pop(name)
        if spelling == "gamma_{}":  # timm's name, in its models with rotary positions
            renamed = {name: tensor for name, tensor in renamed.items() if name != "pos_embed"}
        got = convert(renamed)
        assert all(torch.equal(got.state[name].read(), state[name]) for name in state if ".ls" in name)


def test_gated_networks_are_fused_with_learned_positions_and_apart_with_rope():
    fused, apart = backbone(ffn_layer="swiglufused"), backbone("rope", ffn_layer="swiglu")
    names = [name for name in fused if ".w12." in name]
    split = dict(fused)
    for name in names:
        for number, part in zip("12", split.pop(name).chunk(2), strict=True):
            split[name.replace("w12", f"w{number}")] = part
    converted = convert(split)
    assert_equal(converted.state, fused)
    assert set(converted.converted) == set(names)
    joined = dict(apart)
    for name in [name for name in apart if ".w1." in name]:
        joined[name.replace("w1", "w12")] = torch.cat([joined.pop(name), joined.pop(name.replace("w1", "w2"))])
    assert_equal(convert(joined).state, apart)


def test_unknown_tensors_inside_the_backbone_stay_for_the_comparison_with_the_model():
    extra = {"blocks.1.attn.rel_pos": torch.ones(2), "projector.weight": torch.ones(2)}
    for state in (backbone() | extra, prefixed(backbone() | extra, "backbone.")):
        converted = convert(state)
        assert extra.keys() <= converted.state.keys() and converted.unused == ()
    beside = convert(prefixed(backbone(), "backbone.") | extra)
    assert beside.unused == tuple(extra)


def test_classifiers_are_unused():
    converted = convert(backbone() | {"head.weight": torch.ones(2), "head.bias": torch.ones(2)})
    assert converted.unused == ("head.weight", "head.bias")


def test_resnets_are_found():
    state = resnet18().state_dict()
    converted = convert(prefixed(state, "module.backbone."))
    assert converted.naming == "torchvision ResNet"
    assert_equal(converted.state, {name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    assert converted.unused == ("module.backbone.fc.weight", "module.backbone.fc.bias")


def test_planning_reads_nothing():
    converted = to_official(unread(prefixed(shapes_of(backbone()), "model.")), path="w.pth")
    assert shapes_of(converted.state) == shapes_of(backbone())


def test_files_without_a_backbone():
    known = "known are DINO, DINOv2 and DINOv3 of Meta, timm or Hugging Face, torchvision ResNet"
    bert = {"encoder.layer.0.attention.output.dense.weight": 1, "encoder.layer.0.output.dense.bias": 1, "x": 1, "y": 1}
    assert refusal(bert) == (
        "w.pth: no backbone is recognised in its tensor names (first: encoder.layer.0.attention.output.dense.weight, "
        f"encoder.layer.0.output.dense.bias, x); {known}"
    )
    assert refusal({"dino_head.mlp.0.weight": 1, "ibot_head.mlp.0.weight": 1}) == (
        "w.pth: holds only heads (dino_head, ibot_head) and no backbone; "
        "give the file that holds the backbone, as a teacher_checkpoint.pth does"
    )


def refusal(names):
    with pytest.raises(CheckpointError) as caught:
        convert({name: torch.ones(1) for name in names})
    return str(caught.value)


def test_sizes_of_heads_must_be_known_for_other_libraries():
    state = stored(backbone())
    with pytest.raises(CheckpointError) as caught:
        from_official(state, target="timm", architecture=describe_architecture(state))
    assert str(caught.value) == (
        "its number of attention heads does not show in its tensors at a width of 48; give --config-file"
    )


def test_a_resnet_has_no_place_in_hugging_face():
    state = convert(resnet18().state_dict()).state
    with pytest.raises(CheckpointError) as caught:
        from_official(state, target="hf", architecture=describe_architecture(state))
    assert str(caught.value) == "is a ResNet, for which Hugging Face has other names; export it as timm or dinov2"
