"""Blocks run compiled, or, where that cannot be, exactly as without it."""

import logging
import shutil

import pytest
import torch
from support.dist import run_distributed
from support.meta_arch import random_batch, tiny_arch, tiny_config
from support.training import losses_of, train
from torch import Tensor

from dinov2.distributed import get_rank
from dinov2.models import DinoVisionTransformer
from dinov2.train.build import build_optimizer, compile_blocks, plan_run
from dinov2.train.compilation import run_compiled
from dinov2.train.ssl_meta_arch import SSLMetaArch

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")
FAMILIES = {
    "learned positions, drop path": ["student.drop_path_rate=0.3", "student.drop_path_uniform=true"],
    "rope, SwiGLU, low drop path, full": [
        "defaults=dinov3",
        "student.drop_path_rate=0.05",
        "student.ffn_layer=swiglu64",
        "student.pos_embed_rope_jitter_coords=1.1",
        "student.pos_embed_rope_dtype=fp32",  # in bf16 kernels round less often: gradients differ by 2e-5
        "train.checkpointing_full=true",
    ],
    "low-rank updates, selective": [
        "student.pretrained_weights=x.pth",
        "lora.rank=2",
        "lora.dropout=0.2",
        "train.checkpointing=true",
    ],
}
COMPILE = "train.compile=true"
# With the usual LayerScale of 1e-5, class tokens of all images start so close that KoLeo amplifies rounding.
USUAL = [COMPILE, "train.batch_size_per_gpu=4", "student.layerscale=0.5"]
LINE = "compile=student,teacher mode=default: first steps take longer"


@pytest.fixture(autouse=True)
def _leave_pytorch_as_it_was():
    with torch._dynamo.config.patch(suppress_errors=False, recompile_limit=8):
        yield
    torch._dynamo.reset()


def step(model: SSLMetaArch) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    metrics = model.forward_backward(random_batch(), teacher_temp=0.07)
    after = torch.rand(1)  # the stream of random numbers goes on from where it was
    gradients = {name: param.grad for name, param in model.student.named_parameters() if param.grad is not None}
    return metrics["total_loss"], gradients | {"after": after}


def break_compiler(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def compiled(function, **options):
        def fail(*args):
            raise error

        return fail

    monkeypatch.setattr(torch, "compile", compiled)


@needs_compiler
@pytest.mark.integration
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_an_uncompiled_step(family, caplog):
    assert_compiled_step_is_the_same(family, caplog)


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_compute_what_blocks_compute(family, monkeypatch, caplog):
    compiler = torch.compile

    def without_kernels(function, *, dynamic, options):
        return compiler(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_kernels)
    assert_compiled_step_is_the_same(family, caplog)


def assert_compiled_step_is_the_same(family: str, caplog: pytest.LogCaptureFixture) -> None:
    options = [*FAMILIES[family], *USUAL]
    loss, gradients = step(tiny_arch(options))
    model, cfg = tiny_arch(options), tiny_config(options)
    names = list(model.state_dict())
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="dinov2"):
        compile_blocks(cfg, model, plan=plan_run(cfg, dataset_size=999, world_size=1), device=torch.device("cpu"))
    assert LINE in caplog.messages
    assert torch.equal(torch.get_rng_state(), state)
    own_loss, own = step(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(model.state_dict()) == names
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-5)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            own[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert torch.equal(own["after"], gradients["after"])


@needs_compiler
@pytest.mark.integration
def test_a_run_may_go_on_compiled_or_not(tmp_path):
    # LayerScale of 0.5 keeps images apart, and small differences small
    options = ["student.drop_path_rate=0", "student.layerscale=0.5", "logging.period_steps=1"]
    assert train(tmp_path / "plain", *options) == 0
    for name, first, then in (("begun", True, False), ("ended", False, True)):
        for steps, compiled in ((3, first), (6, then)):
            more = [f"train.compile={str(compiled).lower()}", f"train.max_steps={steps}"]
            assert train(tmp_path / name, *options, *more) == 0
        torch.testing.assert_close(losses_of(tmp_path / name), losses_of(tmp_path / "plain"), rtol=1e-4, atol=1e-4)
        saved = torch.load(tmp_path / name / "model_0000005.rank_0.pth", weights_only=True)["model"]
        plain = torch.load(tmp_path / "plain" / "model_0000005.rank_0.pth", weights_only=True)["model"]
        assert saved.keys() == plain.keys() and not any("_orig_mod" in key for key in saved)
        assert "have changed" not in (tmp_path / name / "logs" / "log.txt").read_text()


@needs_compiler
@pytest.mark.integration
def test_a_compiled_run_goes_on_bit_for_bit(tmp_path):
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        torch._dynamo.reset()  # as in a new process
        assert train(tmp_path / folder, COMPILE, f"train.max_steps={steps}") == 0
    assert torch.equal(losses_of(tmp_path / "parts"), losses_of(tmp_path / "whole"))


def test_without_a_compiler_a_run_warns_once_and_is_the_same(tmp_path, monkeypatch, caplog):
    break_compiler(monkeypatch, RuntimeError("InvalidCxxCompiler: no C++ compiler found\nand a long trace"))
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path / "failed", COMPILE, "train.max_steps=2") == 0
    assert [message for message in caplog.messages if "compile" in message] == [
        "train.compile=true: torch.compile does not work on rank 0, so that no block is compiled: RuntimeError: "
        "InvalidCxxCompiler: no C++ compiler found; the run goes on without; set train.compile=false, or install what "
        "is missing"
    ]
    assert train(tmp_path / "plain", "train.max_steps=2") == 0
    assert torch.equal(losses_of(tmp_path / "failed"), losses_of(tmp_path / "plain"))
    weights = [
        torch.load(tmp_path / name / "model_0000001.rank_0.pth", weights_only=True)["model"]
        for name in ("failed", "plain")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize(("target", "compiled"), [("student", [True, False]), ("teacher", [False, True])])
def test_only_the_target_is_compiled(target, compiled, monkeypatch):
    calls = []

    def compiler(function, **options):
        def run(block, *args):
            calls.append(block)
            return function(block, *args)

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    cfg = tiny_config([COMPILE, f"train.compile_target={target}", "train.batch_size_per_gpu=4"])
    model = SSLMetaArch(cfg)
    model.init_weights(0)
    compile_blocks(cfg, model, plan=plan_run(cfg, dataset_size=999, world_size=1), device=torch.device("cpu"))
    calls.clear()
    step(model)
    assert [set(net.backbone.blocks) <= set(calls) for net in (model.student, model.teacher)] == compiled


@pytest.mark.dist
def test_ranks_agree_when_one_of_them_cannot_compile():
    for answer in run_distributed(compile_on_the_first_rank_alone):
        assert answer == [False, True]


def compile_on_the_first_rank_alone() -> list[bool]:
    backbone = DinoVisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2)
    before = backbone.blocks[0].computed_by

    def try_out(compute):
        if get_rank() == 1:
            raise OSError("no compiler")

    answer = run_compiled([backbone], mode="default", try_out=try_out)
    return [answer, backbone.blocks[0].computed_by is before]


@needs_compiler
@pytest.mark.integration
@pytest.mark.dist
def test_sharded_blocks_compile():
    for plain, compiled, is_compiled in run_distributed(sharded_losses, timeout_s=300):
        assert is_compiled
        assert compiled == pytest.approx(plain, rel=1e-5)


def sharded_losses() -> list:
    """Return the losses of two steps, one after the other, uncompiled and compiled, and whether the latter were."""
    answer = []
    for options in ([], [COMPILE]):
        cfg = tiny_config([*options, "train.batch_size_per_gpu=4", "student.layerscale=0.5"])
        device = torch.device("cpu")
        with torch.device("meta"):
            model = SSLMetaArch(cfg)
        model.prepare_for_distributed_training(
            device, strategy="FULL_SHARD", param_dtype=torch.float32, reduce_dtype=torch.float32
        )
        model.init_weights(0)
        compile_blocks(cfg, model, plan=plan_run(cfg, dataset_size=999, world_size=2), device=device)
        torch._dynamo.config.suppress_errors = False  # what fails now must not pass as uncompiled
        optimizer = build_optimizer(cfg, model)
        losses = []
        for seed in (0, 1):
            metrics = model.forward_backward(random_batch(seed=seed), teacher_temp=0.07)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(metrics["total_loss"].item())
        answer.append(losses)
    return [*answer, torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0]
