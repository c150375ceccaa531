"""A short run with DINOv3's defaults, and schedules as DINOv3's files hold them."""

import torch
from support.golden import golden_shapes
from support.training import DINOV3_RUN, metrics_of, train

SCHEDULES = """
schedules:
  lr: {start: 0.0, peak: 1.0e-3, end: 1.0e-6, warmup_epochs: 1, freeze_last_layer_epochs: 1}
  weight_decay: {start: 0.04, peak: 0.04, end: 0.04, warmup_epochs: 0}
  momentum: {start: 0.9, peak: 0.9, end: 1.0, warmup_epochs: 0, cosine_epochs: 2}
  teacher_temp: {start: 0.04, peak: 0.07, end: 0.07, warmup_epochs: 2}
"""


def test_the_teacher_file_has_the_official_names_and_constant_buffers(tmp_path):
    assert train(tmp_path, *DINOV3_RUN, "evaluation.eval_period_iterations=6", "evaluation.at_start=true") == 0
    start, end = (
        torch.load(tmp_path / "eval" / name / "teacher_checkpoint.pth", weights_only=True)["teacher"]
        for name in ("start", "training_5")
    )
    official = golden_shapes("dinov3_vits16")  # with storage tokens and masked key bias, tied norms, 12 blocks
    official = {
        name for name in official if not name.startswith("blocks.") or name.startswith(("blocks.0.", "blocks.1."))
    }
    untied = {f"{norm}.{part}" for norm in ("cls_norm", "local_cls_norm") for part in ("weight", "bias")}
    assert {name.removeprefix("backbone.") for name in end if "head" not in name} == official | untied
    heads = golden_shapes("dinov3_head(in_dim=384,out_dim=65536)")
    assert {name for name in end if "head" in name} == {
        f"{h}.{name}" for h in ("dino_head", "ibot_head") for name in heads
    }
    constant = {name for name in end if name.endswith(("periods", "bias_mask"))}
    assert len(constant) == 3
    for name in end:
        assert torch.equal(start[name], end[name]) is (name in constant), name
    saved = torch.load(tmp_path / "model_0000005.rank_0.pth", weights_only=True)["model"]
    for name in constant:
        assert torch.equal(saved[f"student.{name}"], end[name]) and torch.equal(saved[f"teacher.{name}"], end[name])


def test_schedules_in_pieces_reach_the_steps(tmp_path):
    config = tmp_path / "schedules.yaml"
    config.write_text(SCHEDULES)
    options = ["train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=3", "train.batch_size_per_gpu=4"]
    assert train(tmp_path / "run", "--config-file", str(config), *DINOV3_RUN, *options) == 0
    rows = metrics_of(tmp_path / "run")
    peak, end = 4 * 1e-3 * (4 / 1024) ** 0.5, 4 * 1e-6 * (4 / 1024) ** 0.5
    columns = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    torch.testing.assert_close(columns["lr"][[0, 1, 2, 5]], torch.tensor([0.0, peak / 2, peak, end]))
    assert columns["last_layer_lr"][:2].tolist() == [0.0, 0.0] and columns["last_layer_lr"][2] == columns["lr"][2]
    torch.testing.assert_close(columns["wd"], torch.full((6,), 0.04))
    torch.testing.assert_close(columns["mom"][[0, 3, 4, 5]], torch.tensor([0.9, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(columns["teacher_temp"][[0, 2, 4]], torch.tensor([0.04, 0.055, 0.07]))
    assert all(row["dino_local_loss_weight"] == 1 for row in rows)
