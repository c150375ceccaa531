"""Runs with low-rank updates: a plain teacher, files as of full training, and resuming."""

import pytest
import torch
from support.meta_arch import random_batch, tiny_arch, tiny_config
from support.training import assert_same_state, metrics_of, train, values_but_timing

from dinov2.checkpoint_format import StoredCheckpoint
from dinov2.errors import CheckpointError
from dinov2.hub.export import FORMATS, export_weights
from dinov2.hub.open_weights import open_weights
from dinov2.hub.stored_tensor import StoredTensor
from dinov2.hub.weights import load_backbone_weights
from dinov2.layers.lora import low_rank_updates, merge_update
from dinov2.models import build_model
from dinov2.train.ssl_meta_arch import SSLMetaArch

LORA = ("student.pretrained_weights=given.pth", "lora.rank=3", "lora.alpha=6")
LAST = "model_0000005"


def moved_arch(overrides=LORA):
    """A model whose updates and other learning parameters are away from where they start."""
    model = tiny_arch(overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.student.parameters():
            if param.requires_grad:
                param += 0.1 * torch.randn(param.shape, generator=generator)
    return model


def merged(network):
    """The plain network's state, by the slow way."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items() if "lora_" not in name}
    for name, layer in low_rank_updates(network):
        weight = layer.weight + layer.lora_scale * layer.lora_b @ layer.lora_a
        state[f"{name}.weight"] = weight.detach()
    return state


def test_the_teacher_follows_the_merged_weights():
    model = moved_arch()
    before = {name: tensor.clone() for name, tensor in model.teacher["backbone"].state_dict().items()}
    target = merged(model.student["backbone"])
    assert before.keys() == target.keys()
    model.update_teacher(0.75)
    for name, tensor in model.teacher["backbone"].state_dict().items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * target[name], msg=name)


@pytest.mark.parametrize("options", [[], ["defaults=dinov3", "student.mask_k_bias=true", "student.ffn_layer=swiglu64"]])
def test_without_momentum_the_teacher_computes_what_the_student_does(options):
    model = moved_arch([*LORA, *options])
    assert not torch.equal(*(model.get_submodule(n).backbone.norm.weight for n in ("student", "teacher")))
    model.update_teacher(0.0)
    model.student.eval()
    images = random_batch()["collated_global_crops"]
    student, teacher = (networks["backbone"](images) for networks in (model.student, model.teacher))
    torch.testing.assert_close(student, teacher, rtol=1e-4, atol=1e-5)
    assert any(layer.lora_b.abs().max() > 0 for _, layer in low_rank_updates(model.student))


def test_student_and_teacher_start_from_the_given_weights():
    given = tiny_arch(seed=5).teacher["backbone"]
    state = {name: StoredTensor.of(tensor) for name, tensor in given.state_dict().items()}
    with torch.device("meta"):
        model = SSLMetaArch(tiny_config(LORA))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.constant_(tensor, torch.nan)
    model.init_weights(3, given={"backbone": state})
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    for name, tensor in given.state_dict().items():
        assert torch.equal(model.teacher["backbone"].state_dict()[name], tensor)
        assert torch.equal(model.student["backbone"].state_dict()[name], tensor)
    images = random_batch()["collated_global_crops"]
    assert torch.equal(model.student.eval()["backbone"](images), model.teacher["backbone"](images))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A start, and two runs from it: of all weights and of low-rank updates."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(folder / "base", "train.max_steps=1", "optim.base_lr=0.1") == 0
    given = f"student.pretrained_weights={folder}/base/model_0000000.rank_0.pth"
    options = [given, "optim.base_lr=0.1", "teacher.momentum_teacher=0.9", "student.layerscale=0.5"]
    low_rank = [*options, "lora.rank=3", "lora.dropout=0.1"]
    assert train(folder / "full", *options) == 0
    assert train(folder / "low_rank", *low_rank) == 0
    assert train(folder / "parts", *low_rank, "train.max_steps=2") == 0
    torch.manual_seed(123)  # what a new process starts with must not matter
    assert train(folder / "parts", *low_rank) == 0
    return folder


def test_resuming_changes_nothing(runs):
    assert_same_state(runs / "low_rank", runs / "parts", name=LAST)
    whole, parts = (values_but_timing(metrics_of(runs / name)) for name in ("low_rank", "parts"))
    assert whole == parts and len(whole) == 6


def test_the_weights_beside_the_updates_stay_bit_for_bit(runs):
    given = open_weights(runs / "base" / "model_0000000.rank_0.pth").states["teacher"]
    stored = StoredCheckpoint.open(runs / "low_rank", LAST)
    learning = {name for group in stored.optimizer["param_groups"] for name in group["params"]}
    same = {name: torch.equal(stored.model[f"student.{name}"].read_all(), given[name].read()) for name in given}
    assert same == {name: f"student.{name}" not in learning for name in given}
    assert sum(name.endswith("lora_a") for name in learning) == 2 * 4
    assert {name.partition("backbone.")[2] for name in learning if "blocks" not in name and "head" not in name} == {
        "norm.weight",
        "norm.bias",
        "mask_token",
    }


def test_the_student_of_a_checkpoint_is_merged_when_it_is_read(runs):
    raw = StoredCheckpoint.open(runs / "low_rank", LAST).model
    states = open_weights(runs / "low_rank" / f"{LAST}.rank_0.pth").states
    plain = open_weights(runs / "full" / f"{LAST}.rank_0.pth").states
    for network in ("student", "teacher"):
        assert {n: t.shape for n, t in states[network].items()} == {n: t.shape for n, t in plain[network].items()}
    layer = "backbone.blocks.1.mlp.fc1"
    weight, lora_a, lora_b = (raw[f"student.{layer}.{name}"].read_all() for name in ("weight", "lora_a", "lora_b"))
    read = states["student"][f"{layer}.weight"].read()
    assert torch.equal(read, merge_update(weight, lora_a, lora_b, scale=16 / 3)) and not torch.equal(read, weight)
    assert torch.equal(states["student"][f"{layer}.bias"].read(), raw[f"student.{layer}.bias"].read_all())


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_low_rank_and_full_training_export_to_the_same_formats(runs, tmp_path, key):
    for target in FORMATS:
        name = {"dinov2": "x.pth", "safetensors": "x.safetensors"}.get(target, "folder")
        written = []
        for run in ("full", "low_rank"):
            path = tmp_path / run / target / name
            path.parent.mkdir(parents=True)
            export_weights(runs / run / f"{LAST}.rank_0.pth", path, target=target, checkpoint_key=key, num_heads=2)
            (state,) = open_weights(path).states.values()
            written.append({tensor_name: (tensor.shape, tensor.dtype) for tensor_name, tensor in state.items()})
        assert written[0] == written[1]


def test_features_of_the_student_are_those_of_its_file(runs):
    model = build_model(
        "vit_tiny", embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=32, in_chans=1, init_values=0.5
    )
    load_backbone_weights(model, runs / "low_rank" / f"{LAST}.rank_0.pth", checkpoint_key="student")
    raw = StoredCheckpoint.open(runs / "low_rank", LAST).model
    options = ["student.embed_dim=32", "student.num_heads=2", "student.patch_size=8", "student.in_chans=1"]
    options += ["crops.global_crops_size=32", "crops.local_crops_size=16", "student.layerscale=0.5"]
    student = tiny_arch([*LORA, *options, "lora.alpha=16"]).student.eval()["backbone"]
    prefix = "student.backbone."
    student.load_state_dict({n.removeprefix(prefix): t.read_all() for n, t in raw.items() if n.startswith(prefix)})
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.eval()(images), student(images), rtol=1e-4, atol=1e-5)


def test_updates_that_nobody_merges_are_refused(runs, tmp_path):
    raw = StoredCheckpoint.open(runs / "low_rank", LAST).model
    state = {name.removeprefix("student."): t.read_all() for name, t in raw.items() if name.startswith("student.")}
    torch.save({"student": state}, tmp_path / "student.pth")
    with pytest.raises(CheckpointError) as caught:
        export_weights(tmp_path / "student.pth", tmp_path / "out.pth", target="dinov2")
    assert str(caught.value) == (
        f"{tmp_path}/student.pth: holds low-rank updates (backbone.blocks.0.attn.qkv.lora_a) beside the weights they "
        f"belong to; merge them first, or give the checkpoint of the run that trained them, or its "
        f"teacher_checkpoint.pth"
    )


REFUSED = (
    "; a run goes on with the settings of student, heads, lora and optim.freeze that it was saved with; to start "
    "another from its weights, name the checkpoint by student.pretrained_weights"
)


def test_a_run_does_not_go_on_with_other_parameters(runs, tmp_path, capsys):
    low_rank = runs / "low_rank" / f"{LAST}.rank_0.pth"
    cases = {
        "the checkpoint does not fit the model: 0 missing (first: none), 16 unexpected (first: "
        "student.backbone.blocks.0.attn.proj.lora_a)": [f"MODEL.WEIGHTS={low_rank}"],
        "the checkpoint does not fit the model: student.backbone.blocks.0.attn.qkv.lora_a is (3, 32) torch.float32, "
        "the model needs (4, 32) torch.float32": [f"MODEL.WEIGHTS={low_rank}", "lora.rank=4", *LORA[:1]],
        "the checkpoint's optimiser does not train the same parameters: student.backbone.blocks.0.norm1.bias is the "
        "checkpoint's alone": [f"train.resume_path={low_rank}", "lora.rank=3", "optim.freeze=[norms]"],
    }
    for number, (sentence, options) in enumerate(cases.items()):
        assert train(tmp_path / str(number), *options, "student.layerscale=0.5") == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}{REFUSED}"
    start = f"student.pretrained_weights={low_rank}"
    assert train(tmp_path / "on", start, "student.layerscale=0.5", "train.max_steps=1") == 0
