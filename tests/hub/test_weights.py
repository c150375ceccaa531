"""Loading backbone weights: every known file layout, whole or not at all, and one sentence for each way to fail."""

import argparse
import re

import pytest
import torch
from safetensors.torch import save_file

from dinov2.errors import CheckpointError
from dinov2.hub.weights import flatten_block_chunks, load_backbone_weights, read_weights
from dinov2.models import DinoVisionTransformer

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1e-5}


def backbone(seed=0, **settings):
    model = DinoVisionTransformer(**(SMALL | settings))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


def chunked(state):
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name): tensor for name, tensor in state.items()}


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


LAYOUTS = {
    "bare": lambda state: state,
    "module": lambda state: prefixed(state, "module."),
    "model": lambda state: {"model": state, "epoch": 3},
    "model_prefixed": lambda state: {"model": prefixed(state, "module.backbone.")},
    "teacher": lambda state: {"teacher": prefixed(state, "backbone.") | {"dino_head.last_layer.weight": torch.ones(2)}},
    "both": lambda state: {
        "student": prefixed({k: v + 1 for k, v in state.items()}, "backbone."),
        "teacher": prefixed(state, "module.backbone."),
    },
    "chunked": lambda state: {"teacher": prefixed(chunked(state), "backbone.")},
    "bare_chunked": chunked,
}


def fails_with(path, model=None, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        load_backbone_weights(model or backbone(1), path, **kwargs)
    return str(caught.value).removeprefix(f"{path}: ")


def saved(path, state):
    torch.save(state, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_layouts_load_whole(tmp_path, layout):
    source, model = backbone(0), backbone(1)
    path = saved(tmp_path / "weights.pth", LAYOUTS[layout](source.state_dict()))
    report = load_backbone_weights(model, path)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (len(report.loaded), report.missing) == (len(source.state_dict()), ())
    assert report.unused == (("dino_head.last_layer.weight",) if layout == "teacher" else ())


def test_safetensors_load(tmp_path):
    source, model = backbone(0), backbone(1)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_backbone_weights(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


def test_old_format_of_pytorch_loads(tmp_path):
    source, model = backbone(0), backbone(1)
    torch.save(source.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_backbone_weights(model, tmp_path / "old.pth")
    assert torch.equal(model.cls_token, source.cls_token)


def test_checkpoint_key_chooses_the_network(tmp_path):
    source, model = backbone(0), backbone(1)
    path = saved(tmp_path / "both.pth", LAYOUTS["both"](source.state_dict()))
    report = load_backbone_weights(model, path, checkpoint_key="student")
    assert report.found_under == "student"
    assert torch.equal(model.cls_token, source.cls_token + 1)


def test_absent_checkpoint_key_is_refused(tmp_path):
    path = saved(tmp_path / "teacher.pth", LAYOUTS["teacher"](backbone().state_dict()))
    assert fails_with(path, checkpoint_key="student") == "has no 'student' but has 'teacher'; ask for that key"
    assert fails_with(path, checkpoint_key="ema") == "has no 'ema'; use one of teacher"


def test_mask_token_may_be_missing_and_is_reported(tmp_path):
    source, model = backbone(0), backbone(1)
    before = model.mask_token.clone()
    state = {name: tensor for name, tensor in source.state_dict().items() if name != "mask_token"}
    report = load_backbone_weights(model, saved(tmp_path / "w.pth", state))
    assert report.missing == ("mask_token",)
    assert torch.equal(model.mask_token, before)
    assert str(report) == f"weights={tmp_path}/w.pth loaded={len(state)} resized=0 missing=1 (mask_token) unused=0"


def test_a_missing_tensor_is_refused_and_nothing_is_changed(tmp_path):
    model = backbone(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = backbone(0).state_dict()
    del state["norm.bias"]
    path = saved(tmp_path / "w.pth", state)
    assert fails_with(path, model) == "does not fit the model: 1 tensors missing (first: norm.bias)"
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_unknown_tensor_is_refused(tmp_path):
    path = saved(tmp_path / "w.pth", backbone(0).state_dict() | {"head.weight": torch.ones(2)})
    assert fails_with(path) == "does not fit the model: 1 unknown (first: head.weight)"


def test_non_finite_weights_are_refused(tmp_path):
    state = backbone(0).state_dict()
    state["norm.bias"][0] = float("nan")
    path = saved(tmp_path / "w.pth", state)
    assert fails_with(path) == f"1 of {len(state)} tensors hold NaN or infinity (first: norm.bias)"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"embed_dim": 64}, "its embedding has 64 features but the model's has 32; set student.embed_dim=64"),
        ({"embed_dim": 384}, "its embedding has 384 features but the model's has 32; set student.arch=vit_small"),
        ({"depth": 3}, "it has 3 blocks but the model has 2; set student.arch or student.depth"),
        (
            {"num_register_tokens": 4},
            "it has 4 register tokens but the model has 0; set student.num_register_tokens=4",
        ),
        (
            {"ffn_layer": "swiglufused"},
            "its blocks have the FFN 'swiglufused' but the model's 'mlp'; set student.ffn_layer=swiglufused",
        ),
        ({"init_values": None}, "it has no LayerScale but the model has; set student.layerscale=null"),
        ({"patch_size": 16}, "its patch size is 16 but the model's is 8; set student.patch_size=16"),
        ({"in_chans": 1}, "it takes images of 1 channels but the model takes 3; set student.in_chans=1"),
    ],
)
def test_the_cause_of_a_mismatch_is_named(tmp_path, settings, sentence):
    assert fails_with(saved(tmp_path / "w.pth", backbone(**settings).state_dict())) == sentence


def test_positions_are_resized_to_the_models_grid_by_its_own_rule(tmp_path):
    large = backbone(img_size=64)
    path = saved(tmp_path / "w.pth", large.state_dict())
    model = backbone(1)
    report = load_backbone_weights(model, path)
    assert report.resized == ("pos_embed",) and "resized=1" in str(report)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(image), large(image))


def test_positions_that_are_no_square_grid_are_refused(tmp_path):
    state = backbone().state_dict()
    state["pos_embed"] = torch.zeros(1, 12, state["pos_embed"].shape[2])
    assert fails_with(saved(tmp_path / "w.pth", state)) == (
        "its pos_embed has 12 positions, which are not a class token and a square grid; the model has 17"
    )


def test_foreign_names_are_recognised(tmp_path):
    path = saved(tmp_path / "w.pth", {"embeddings.cls_token": torch.ones(1, 1, 32)})
    assert fails_with(path) == (
        "holds a backbone with the names of Hugging Face transformers, which cannot be read here; "
        "use DINOv2's own .pth file"
    )
    path = saved(tmp_path / "resnet.pth", {"conv1.weight": torch.ones(3)})
    assert fails_with(path) == (
        "is not a vision transformer of DINOv2 (no cls_token or patch_embed); its first name is conv1.weight"
    )


def test_missing_files_and_folders(tmp_path):
    assert fails_with(tmp_path / "none.pth") == "no such file of weights"
    assert fails_with(tmp_path) == "is a folder; give the .pth or .safetensors file in it"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty (0 bytes); download or save it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
            "is a git-LFS pointer, not the weights; fetch them with: git lfs pull",
        ),
        (
            b"\n<!DOCTYPE html><html>",
            "is a web page, not weights; the download was answered by a page (log-in or wrong address)",
        ),
        (
            b"some text",
            "is not a file of weights that PyTorch can read, or is truncated (0.0 MiB); download or save it again",
        ),
    ],
)
def test_files_that_are_no_weights(tmp_path, content, sentence):
    (tmp_path / "w.pth").write_bytes(content)
    assert fails_with(tmp_path / "w.pth") == sentence


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_truncated_files(tmp_path, kept):
    path = saved(tmp_path / "w.pth", backbone().state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert re.fullmatch(
        r"ends early \(0\.\d MiB are there\), it is truncated; download or save it again", fails_with(path)
    )
    save_file(backbone().state_dict(), tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[: int(kept * len(content))])
    assert fails_with(tmp_path / "w.safetensors").startswith(
        "cannot be read as safetensors, it is truncated or damaged"
    )


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickled_objects_are_refused(tmp_path, as_zip):
    torch.save(
        {"model": backbone().state_dict(), "args": argparse.Namespace(lr=1)},
        tmp_path / "w.pth",
        _use_new_zipfile_serialization=as_zip,
    )
    assert fails_with(tmp_path / "w.pth") == (
        "holds Python objects besides tensors, which are refused because reading them can run code; "
        "give a teacher_checkpoint.pth, or re-save the state dict alone"
    )


def test_rank_files_and_training_checkpoints_are_refused(tmp_path):
    path = saved(tmp_path / "model_0000009.rank_0.pth", {"model": {}})
    assert fails_with(path) == (
        "is one rank's part of a training checkpoint; give a teacher_checkpoint.pth from the eval folder of the run"
    )
    path = saved(tmp_path / "renamed.pth", {"model": {"a": torch.ones(1)}, "optimizer": {}, "iteration": 3})
    assert fails_with(path) == (
        "is a training checkpoint, not a backbone; give a teacher_checkpoint.pth from the eval folder of the run"
    )


def test_other_content_is_refused(tmp_path):
    assert fails_with(saved(tmp_path / "list.pth", [torch.ones(1)])) == "holds a list, not a dict of named tensors"
    assert fails_with(saved(tmp_path / "none.pth", {})) == "holds no tensors"
    assert fails_with(saved(tmp_path / "mixed.pth", {"weights": {"a": torch.ones(1)}})) == (
        "is not a known file of weights; 'weights' is a dict, not a tensor "
        "(known: a state dict, bare or under 'teacher', 'student' or 'model')"
    )


def test_read_weights_returns_the_file_as_it_stands(tmp_path):
    content = read_weights(saved(tmp_path / "w.pth", {"teacher": {"a": torch.ones(2)}}))
    assert list(content) == ["teacher"] and torch.equal(content["teacher"]["a"], torch.ones(2))


def test_block_chunks_are_flattened():
    names = ["blocks.0.3.norm1.weight", "blocks.12.norm1.weight", "blocks.1.7.mlp.fc1.bias", "cls_token"]
    flat = flatten_block_chunks({name: torch.ones(1) for name in names})
    assert list(flat) == ["blocks.3.norm1.weight", "blocks.12.norm1.weight", "blocks.7.mlp.fc1.bias", "cls_token"]
