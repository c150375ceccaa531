"""Loading backbone weights: whole or not at all, and a report of what was loaded, converted, resized, left, unused."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dinov2.errors import CheckpointError
from dinov2.hub.stored_tensor import StoredTensor
from dinov2.hub.weights import choose_network, load_backbone_weights, plan_head, plan_weights
from dinov2.hub.weights_file import WeightsFile
from dinov2.layers.dino_head import DINOHead
from dinov2.models import DinoVisionTransformer, build_model

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1e-5}
V3 = {"pos_embed_type": "rope", "num_register_tokens": 2, "mask_k_bias": True}


def backbone(seed=0, **settings):
    model = DinoVisionTransformer(**(SMALL | settings))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


def on_meta(**settings):
    with torch.device("meta"):
        return DinoVisionTransformer(**(SMALL | settings))


def chunked(state):
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name): tensor for name, tensor in state.items()}


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


LAYOUTS = {
    "bare": (None, lambda state: state),
    "module": (None, lambda state: prefixed(state, "module.")),
    "compiled": (None, lambda state: prefixed(state, "_orig_mod.")),
    "model": ("model", lambda state: {"model": state, "epoch": 3}),
    "model_prefixed": ("model", lambda state: {"model": prefixed(state, "module.backbone.")}),
    "state_dict": ("state_dict", lambda state: {"state_dict": prefixed(state, "backbone."), "epoch": 3}),
    "teacher": (
        "teacher",
        lambda state: {"teacher": prefixed(state, "backbone.") | {"dino_head.last_layer.weight": torch.ones(2)}},
    ),
    "both": (
        "teacher",
        lambda state: {
            "student": prefixed({k: v + 1 for k, v in state.items()}, "backbone."),
            "teacher": prefixed(state, "module.backbone."),
        },
    ),
    "chunked": ("teacher", lambda state: {"teacher": prefixed(chunked(state), "backbone.")}),
    "bare_chunked": (None, chunked),
}


def fails_with(path, model=None, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        load_backbone_weights(model or backbone(1), path, **kwargs)
    return str(caught.value).removeprefix(f"{path}: ")


def saved(path, state):
    torch.save(state, path)
    return path


def copy_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [{}, V3], ids=["dinov2", "dinov3"])
def test_known_layouts_load_whole(tmp_path, layout, settings):
    source, model = backbone(0, **settings), backbone(1, **settings)
    key, make = LAYOUTS[layout]
    report = load_backbone_weights(model, saved(tmp_path / "weights.pth", make(source.state_dict())))
    assert_equal(model.state_dict(), source.state_dict())
    assert (len(report.loaded), report.missing) == (len(source.state_dict()), ())
    assert report.found_under == key and report.naming == ("DINOv3" if settings else "DINOv2")
    assert (report.heads, report.unused) == (("dino_head",) if layout == "teacher" else (), ())
    assert report.num_parameters["loaded"] == sum(tensor.numel() for tensor in source.state_dict().values())


def test_safetensors_load(tmp_path):
    source, model = backbone(0), backbone(1)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_backbone_weights(model, tmp_path / "weights.safetensors")
    assert_equal(model.state_dict(), source.state_dict())


def test_half_precision_files_fill_a_model_of_float32(tmp_path):
    source, model = backbone(0), backbone(1)
    load_backbone_weights(model, saved(tmp_path / "w.pth", copy_of(source.half().state_dict())))
    assert model.cls_token.dtype == torch.float32
    assert_equal(model.half().state_dict(), source.state_dict())


@pytest.mark.parametrize("settings", [{}, V3], ids=["dinov2", "dinov3"])
def test_a_model_on_the_meta_device_is_made_and_filled(tmp_path, settings):
    source, model = backbone(0, **settings), on_meta(**settings)
    load_backbone_weights(model, saved(tmp_path / "w.pth", source.state_dict()))
    assert_equal(model.state_dict(), source.state_dict())
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.eval()(image), source.eval()(image))


def test_what_a_meta_model_lacks_is_initialised_the_same_each_time(tmp_path):
    state = copy_of(backbone(0, **V3).state_dict())
    lacking = ("mask_token", "rope_embed.periods", "blocks.0.attn.qkv.bias_mask", "blocks.1.attn.qkv.bias_mask")
    expected = copy_of(state) | {"mask_token": torch.zeros_like(state["mask_token"])}
    path = saved(tmp_path / "w.pth", {name: tensor for name, tensor in state.items() if name not in lacking})
    model = on_meta(**V3)
    report = load_backbone_weights(model, path)
    assert set(report.missing) == set(lacking)
    assert_equal(model.state_dict(), expected)  # masks and periods are constants
    partial = {name: state[name] for name in ("cls_token", "norm.bias", "norm.weight")}
    first, second = on_meta(**V3), on_meta(**V3)
    for model in (first, second):
        load_backbone_weights(model, saved(tmp_path / "w.pth", partial), allow_partial=True)
    assert_equal(second.state_dict(), first.state_dict())
    assert not any(tensor.isnan().any() for tensor in first.state_dict().values())


def test_heads_that_a_config_states_must_be_the_models():
    state = {name: StoredTensor.of(tensor) for name, tensor in backbone().state_dict().items()}
    for config in ({"num_attention_heads": 4}, {"architecture": "vit", "model_args": {"num_heads": 4}}):
        with pytest.raises(CheckpointError) as caught:
            file = WeightsFile("folder", "Hugging Face folder", {"": state}, config=config)
            plan_weights(on_meta(), file, allow_partial=True)
        assert str(caught.value) == (
            "folder: its config states 4 attention heads but the model has 2; set student.num_heads=4"
        )
    plan_weights(on_meta(), WeightsFile("folder", "Hugging Face folder", {"": state}, config={"model_args": None}))


def test_planning_reads_no_tensor():
    def refuse():
        raise AssertionError("only the plan is wanted")

    source = backbone(img_size=64, patch_size=16, in_chans=1).state_dict()
    state = {name: StoredTensor(tensor.shape, tensor.dtype, refuse) for name, tensor in source.items()}
    plan = plan_weights(on_meta(), WeightsFile("w.pth", "PyTorch file", {"": state}))
    assert set(plan.state) == set(source) and plan.missing == ()
    assert set(plan.report.resized) == {"patch_embed.proj.weight"}  # 4 x 4 patches in both


def test_checkpoint_key_chooses_the_network(tmp_path):
    source, model = backbone(0), backbone(1)
    path = saved(tmp_path / "both.pth", LAYOUTS["both"][1](source.state_dict()))
    report = load_backbone_weights(model, path, checkpoint_key="student")
    assert report.found_under == "student"
    assert torch.equal(model.cls_token, source.cls_token + 1)


def test_absent_checkpoint_key_is_refused(tmp_path):
    path = saved(tmp_path / "teacher.pth", LAYOUTS["teacher"][1](backbone().state_dict()))
    assert fails_with(path, checkpoint_key="student") == (
        "has no 'student' but has 'teacher'; take that one with --checkpoint-key teacher"
    )
    assert fails_with(path, checkpoint_key="ema") == "has no 'ema'; use one of teacher"
    path = saved(tmp_path / "bare.pth", backbone().state_dict())
    assert fails_with(path, checkpoint_key="ema") == "has no 'ema'; use one of teacher, student"


@pytest.mark.parametrize("prefix", ["", "module.student."])
def test_a_student_without_a_teacher_is_taken_unless_the_teacher_is_asked_for(tmp_path, prefix):
    source, model = backbone(0), backbone(1)
    state = prefixed(source.state_dict(), prefix)
    path = saved(tmp_path / "w.pth", state if prefix else {"student": state})
    assert fails_with(path, checkpoint_key="teacher") == (
        "has no 'teacher' but has 'student'; take that one with --checkpoint-key student"
    )
    load_backbone_weights(model, path)
    assert_equal(model.state_dict(), source.state_dict())


def test_whole_numbers_are_refused_in_part_too(tmp_path):
    state = backbone().state_dict()
    path = saved(tmp_path / "w.pth", state | {"norm.weight": state["norm.weight"].to(torch.int8)})
    for allow_partial in (False, True):
        assert fails_with(path, allow_partial=allow_partial) == (
            "norm.weight holds numbers of type int8, as quantised models do; give weights of float32 or bfloat16"
        )


def test_a_file_without_networks_is_refused():
    file = WeightsFile("w.pth", "PyTorch file", {}, extra_keys=("optimizer", "iteration"))
    with pytest.raises(CheckpointError) as caught:
        choose_network(file, "teacher")
    assert str(caught.value) == (
        "w.pth: holds no network (optimizer, iteration); give the file of the model, e.g. teacher_checkpoint.pth"
    )


def test_mask_token_may_be_missing_and_is_reported(tmp_path):
    source, model = backbone(0), backbone(1)
    before = model.mask_token.clone()
    state = {name: tensor for name, tensor in source.state_dict().items() if name != "mask_token"}
    report = load_backbone_weights(model, saved(tmp_path / "w.pth", state))
    assert report.missing == ("mask_token",)
    assert torch.equal(model.mask_token, before)
    num = sum(tensor.numel() for tensor in state.values())
    assert str(report) == (
        f"weights={tmp_path}/w.pth names=DINOv2 loaded={len(state)} ({num / 1e6:.2f} M values) converted=0 resized=0 "
        "left_at_initial_values=1 (32 values: mask_token) heads=0 unused=0"
    )


def test_the_report_names_what_was_changed_and_unused(tmp_path):
    state = prefixed(backbone(img_size=64, in_chans=1).state_dict(), "backbone.")
    state["backbone.blocks.0.ls1.weight"] = state.pop("backbone.blocks.0.ls1.gamma")
    state |= {f"dino_head.mlp.{i}.weight": torch.ones(3) for i in range(8)}
    state |= {f"dino_loss.extra{i}": torch.ones(1) for i in range(8)}
    report = load_backbone_weights(backbone(1), saved(tmp_path / "w.pth", {"teacher": state}))
    assert report.converted == ("blocks.0.ls1.gamma",)
    assert report.num_parameters | {"loaded": 0} == {
        "loaded": 0,
        "converted": 32,
        "resized": 17 * 32 + 32 * 3 * 64,
        "missing": 0,
        "heads": 24,
        "unused": 8,
    }
    text = str(report)
    assert " key=teacher loaded=" in text and " converted=1 (32 values) " in text
    assert "resized=2 (6688 values: patch_embed.proj.weight: 1 -> 3 channels, pos_embed: 8x8 -> 4x4 patches)" in text
    names = ", ".join(f"dino_loss.extra{i}" for i in range(6))
    assert text.endswith(f"heads=1 (24 values: dino_head) unused=8 (8 values: {names}, 2 more)")


def test_a_missing_tensor_is_refused_and_nothing_is_changed(tmp_path):
    model = backbone(1)
    before = copy_of(model.state_dict())
    state = backbone(0).state_dict()
    del state["norm.bias"]
    path = saved(tmp_path / "w.pth", state)
    assert fails_with(path, model) == (
        f"it holds {len(before) - 1} of the model's {len(before)} tensors; missing: 1 (first: norm.bias); "
        "set student.allow_partial_weights=true to load what fits"
    )
    assert_equal(model.state_dict(), before)


def test_part_of_a_backbone_loads_if_that_is_allowed(tmp_path):
    source, model = backbone(0, num_register_tokens=4), backbone(1)
    before = copy_of(model.state_dict())
    state = {name: tensor for name, tensor in source.state_dict().items() if "blocks.1" not in name}
    path = saved(tmp_path / "w.pth", state)
    report = load_backbone_weights(model, path, allow_partial=True)
    left = {name for name in before if "blocks.1" in name}
    assert set(report.missing) == left and report.unused == ("register_tokens",)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in left else state[name]), name


def test_a_file_that_fits_in_nothing_is_refused_all_the_same(tmp_path):
    path = saved(tmp_path / "w.pth", backbone(embed_dim=64).state_dict())
    assert fails_with(path, allow_partial=True) == (
        "its embedding has 64 features but the model's has 32; set student.embed_dim=64"
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("meta", [False, True])
def test_non_finite_weights_are_refused_and_nothing_is_changed(tmp_path, meta, value):
    state = copy_of(backbone(0).state_dict())
    state["norm.bias"][0] = float(value)
    path = saved(tmp_path / "w.pth", state)
    model = on_meta() if meta else backbone(1)
    before = None if meta else copy_of(model.state_dict())
    assert fails_with(path, model) == (
        "norm.bias holds NaN or infinity; the file is damaged, or its training had diverged"
    )
    if meta:
        assert all(tensor.is_meta for tensor in model.state_dict().values())
    else:
        assert_equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"embed_dim": 64}, "its embedding has 64 features but the model's has 32; set student.embed_dim=64"),
        ({"depth": 3}, "it has 3 blocks but the model has 2; set student.depth=3"),
        (
            {"num_register_tokens": 4},
            "it has 4 register tokens but the model has 0; set student.num_register_tokens=4, "
            "and student.interpolate_antialias=true student.interpolate_offset=0",
        ),
        (
            {"ffn_layer": "swiglufused"},
            "its blocks have the FFN 'swiglufused' but the model's 'mlp'; set student.ffn_layer=swiglufused",
        ),
        ({"init_values": None}, "it has no LayerScale but the model has; set student.layerscale=null"),
        (
            V3,
            "it is a DINOv3 backbone (rotary positions) but the model is a DINOv2 one (learned positions); set "
            "student.pos_embed_type=rope student.norm_layer=layernormbf16 (or defaults=dinov3), and "
            "student.num_register_tokens=2 student.mask_k_bias=true",
        ),
    ],
)
def test_the_cause_of_a_mismatch_is_named(tmp_path, settings, sentence):
    assert fails_with(saved(tmp_path / "w.pth", backbone(**settings).state_dict())) == sentence


def test_heads_alone_are_refused(tmp_path):
    head = DINOHead(32, 16, hidden_dim=8, bottleneck_dim=4).state_dict()
    path = saved(tmp_path / "w.pth", {"teacher": prefixed(head, "dino_head.")})
    assert fails_with(path) == (
        "holds only heads (dino_head) and no backbone; give the file that holds the backbone, as a "
        "teacher_checkpoint.pth does"
    )


def test_an_optimiser_alone_is_refused(tmp_path):
    model = backbone()
    optimizer = torch.optim.AdamW(model.parameters())
    path = saved(tmp_path / "w.pth", {"optimizer": optimizer.state_dict(), "iteration": 3})
    assert fails_with(path) == (
        "holds the state of an optimiser (under 'optimizer') but no network; give the file that holds the weights"
    )


def test_positions_are_resized_to_the_models_grid_by_its_own_rule(tmp_path):
    large = backbone(img_size=64)
    path = saved(tmp_path / "w.pth", large.state_dict())
    model = backbone(1)
    report = load_backbone_weights(model, path)
    assert report.resized == {"pos_embed": "8x8 -> 4x4 patches"}
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(image), large(image))


def test_positions_that_are_no_square_grid_are_refused(tmp_path):
    state = backbone().state_dict()
    state["pos_embed"] = torch.zeros(1, 12, state["pos_embed"].shape[2])
    assert fails_with(saved(tmp_path / "w.pth", state)) == (
        "its pos_embed has 12 positions, which are not a class token and a square grid"
    )


def test_a_grey_model_gets_the_same_features_of_grey_images(tmp_path):
    colour, grey = backbone(), backbone(1, in_chans=1)
    report = load_backbone_weights(grey, saved(tmp_path / "w.pth", colour.state_dict()))
    assert report.resized == {"patch_embed.proj.weight": "3 -> 1 channels"}
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, V3], ids=["dinov2", "dinov3"])
def test_a_larger_patch_gives_the_same_features_of_larger_patches(tmp_path, settings):
    small, large = backbone(0, **settings), backbone(1, img_size=64, patch_size=16, **settings)
    report = load_backbone_weights(large, saved(tmp_path / "w.pth", small.state_dict()))
    assert report.resized == {"patch_embed.proj.weight": "patches of 8 -> 16 px"}
    patches = torch.randn(16, 3, 8, 8)
    resized = torch.nn.functional.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    image, large_image = (  # resized patch by patch
        tiles.unflatten(0, (4, 4)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None] for tiles in (patches, resized)
    )
    # a pseudo-inverse in float32; bfloat16 angles of RoPE are the same
    torch.testing.assert_close(large.eval()(large_image), small.eval()(image), atol=1e-3, rtol=1e-3)


def test_heads_are_planned_and_fit_or_not(tmp_path):
    sizes = {"hidden_dim": 8, "bottleneck_dim": 4}
    source, head = DINOHead(32, 16, **sizes), DINOHead(32, 16, **sizes)
    for module in (source, head):
        module.init_weights()
    state = prefixed(backbone().state_dict(), "backbone.") | prefixed(source.state_dict(), "dino_head.")
    plan = plan_weights(on_meta(), saved(tmp_path / "w.pth", {"teacher": state}))
    fitting = plan_head(head, plan.heads["dino_head"])
    assert_equal({name: stored.read() for name, stored in fitting.items()}, source.state_dict())
    other = DINOHead(32, 99, **sizes)
    assert plan_head(other, plan.heads["dino_head"]) == "it has 16 prototypes, the model 99"
    plain = DINOHead(32, 16, weight_norm=False, **sizes)
    assert plan_head(plain, plan.heads["dino_head"]) == "it has weight normalisation, the model has none"
    assert (plan.report.heads, plan.report.unused) == (("dino_head",), ())


MEASURE = """
import sys, threading, torch
from dinov2.hub.weights import load_backbone_weights
from dinov2.models import build_model

def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

with torch.device("meta"):
    model = build_model(sys.argv[2], img_size=518, patch_size=14, init_values=1e-5, ffn_layer="swiglufused")
before, peak, done = anonymous_bytes(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
load_backbone_weights(model, sys.argv[1])
done.set()
thread.join()
peak = max(peak, anonymous_bytes())
print((peak - before) / sum(4 * tensor.numel() for tensor in model.state_dict().values()))
"""


def peak_over_size(path, arch):
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path), arch], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def save_zeros(path, arch):
    """Write a file of the right size without holding it: its zeros are a hole."""
    with torch.device("meta"):
        model = build_model(arch, img_size=518, patch_size=14, init_values=1e-5, ffn_layer="swiglufused")
    if path.suffix == ".pth":
        with torch.serialization.skip_data():
            torch.save(model.to_empty(device="cpu").state_dict(), path)
        return
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        end += 4 * tensor.numel()
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.integration
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_vit_g_loads_in_little_more_memory_than_its_own(tmp_path, suffix):
    path = tmp_path / f"vitg{suffix}"
    save_zeros(path, "vit_giant2")
    assert path.stat().st_size > 4.5e9  # 1.1 B parameters
    assert 0.95 < peak_over_size(path, "vit_giant2") < 1.3
