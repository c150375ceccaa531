import numpy as np
import pytest
from support.golden import load_golden
from support.meta_arch import tiny_config

from dinov2.train.build import build_schedules, plan_run
from dinov2.train.schedules import CosineScheduler, Schedules, linear_warmup_cosine_decay, scaled_lr

# Schedules in DINOv3's form, as a file may hold them.
PIECEWISE = [
    "schedules.lr.start=0.1",
    "schedules.lr.peak=0.4",
    "schedules.lr.end=0.2",
    "schedules.lr.warmup_epochs=1",
    "schedules.lr.cosine_epochs=2",
    "schedules.lr.freeze_last_layer_epochs=1",
    "schedules.weight_decay.start=0.04",
    "schedules.weight_decay.peak=0.04",
    "schedules.weight_decay.end=0.04",
    "schedules.weight_decay.warmup_epochs=0",
    "schedules.momentum.start=0.9",
    "schedules.momentum.peak=0.9",
    "schedules.momentum.end=1.0",
    "schedules.momentum.warmup_epochs=0",
    "schedules.teacher_temp.start=0.04",
    "schedules.teacher_temp.peak=0.07",
    "schedules.teacher_temp.end=0.07",
    "schedules.teacher_temp.warmup_epochs=2",
]


@pytest.mark.parametrize(
    ("name", "options"),
    [("cosine", {}), ("cosine_freeze", {"freeze_iters": 5}), ("cosine_trunc", {"trunc_extra": 0.25})],
)
def test_cosine_equals_the_official_schedule(name, options):
    schedule = CosineScheduler(1e-3, 1e-6, 50, warmup_iters=10, **options)
    expected = load_golden("schedules_v3")[name]
    np.testing.assert_allclose([schedule[i] for i in range(50)], expected, rtol=1e-12)
    assert schedule[50] == schedule[5000] == 1e-6


@pytest.mark.parametrize(
    ("name", "cosine_iterations"), [("linear_warmup_cosine", None), ("linear_warmup_cosine_const", 30)]
)
def test_linear_warm_up_and_cosine_equal_the_official_schedule(name, cosine_iterations):
    schedule = linear_warmup_cosine_decay(0.0, 1e-3, 1e-6, 10, 50, cosine_iterations)
    expected = load_golden("schedules_v3")[name]
    np.testing.assert_allclose([schedule[i] for i in range(50)], expected, rtol=1e-12)
    assert schedule[50] == schedule[5000] == 1e-6


@pytest.mark.parametrize("trunc_extra", [0.0, 0.25])
@pytest.mark.parametrize("total", [0, 1, 2, 10])
def test_short_schedules_are_finite(total, trunc_extra):
    schedule = CosineScheduler(1.0, 0.5, total, trunc_extra=trunc_extra)
    assert [schedule[0], schedule[total]] == [1.0 if total else 0.5, 0.5]
    assert len(schedule) == total and np.isfinite(schedule.schedule).all()


def test_epochs_become_steps_and_the_last_layer_waits():
    cfg = tiny_config(
        [
            "optim.epochs=4",
            "optim.warmup_epochs=1",
            "optim.freeze_last_layer_epochs=2",
            "teacher.warmup_teacher_temp_epochs=2",
        ]
    )
    schedules = Schedules(cfg, lr=0.5, end_lr=0.001, epoch_length=10)
    assert schedules[0].lr == 0 and schedules[10].lr == 0.5 and schedules[40].lr == 0.001
    assert schedules[19].last_layer_lr == 0 and schedules[20].last_layer_lr == schedules[20].lr
    assert schedules[0].teacher_temp == pytest.approx(0.04) and schedules[20].teacher_temp == pytest.approx(0.07)
    assert schedules[0].momentum == pytest.approx(0.992) and schedules[40].momentum == 1
    assert schedules[0].wd == pytest.approx(0.04) and schedules[40].wd == pytest.approx(0.4)
    assert schedules[0].dino_local_loss_weight == schedules[40].dino_local_loss_weight == 1


@pytest.mark.parametrize(
    ("frozen", "ramp", "expected"),
    [
        (0, 0, [1] * 7),
        (0.5, 0.5, [0, 0, 0, 1 / 3, 2 / 3, 1, 1]),
        (0, 0.3, [0.5, 1, 1, 1, 1, 1, 1]),  # 1.8 steps are 2
        (0.1, 0, [0, 1, 1, 1, 1, 1, 1]),  # 0.6 steps are 1
        (2, 0, [0] * 7),
    ],
)
def test_the_backbone_stays_frozen_and_thaws_in_equal_parts(frozen, ramp, expected):
    epochs = [f"optim.freeze_backbone_epochs={frozen}", f"optim.unfreeze_ramp_epochs={ramp}"]
    others = ["optim.epochs=3", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0"]
    for family in ([], PIECEWISE):
        plain, schedules = (
            Schedules(tiny_config([*others, *family, *more]), lr=0.5, end_lr=0.001, epoch_length=6)
            for more in ([], [*epochs, "optim.backbone_lr_multiplier=0.5", "optim.head_lr_multiplier=3"])
        )
        assert [schedules[step].backbone_lr_factor for step in range(7)] == pytest.approx([0.5 * x for x in expected])
        assert {schedules[step].head_lr_factor for step in range(7)} == {3}
        assert [schedules[step].lr for step in range(12)] == [plain[step].lr for step in range(12)]


def test_teacher_momentum_and_temperature_change_with_every_step():
    options = ["teacher.momentum_teacher=0.996", "teacher.final_momentum_teacher=0.9995", "optim.epochs=2"]
    options += ["optim.warmup_epochs=0", "teacher.warmup_teacher_temp_epochs=1"]
    schedules = Schedules(tiny_config(options), lr=0.5, end_lr=0.0, epoch_length=5)
    momenta, temperatures = ([getattr(schedules[i], name) for i in range(11)] for name in ("momentum", "teacher_temp"))
    assert momenta[0] == 0.996 and momenta[10] == 0.9995 and sorted(set(momenta)) == momenta
    assert temperatures[0] == 0.04 and temperatures[5] == 0.07 and sorted(set(temperatures[:5])) == temperatures[:5]


def test_a_truncated_cosine_ends_at_the_final_value_within_the_run():
    options = ["optim.epochs=4", "optim.warmup_epochs=1"]
    plain, cut = (
        Schedules(tiny_config([*options, *more]), lr=0.5, end_lr=0.0, epoch_length=10)
        for more in ([], ["optim.schedule_trunc_extra=0.25"])
    )
    assert plain[39].lr > 0 and cut[39].lr == 0 and cut[10].lr == plain[10].lr == 0.5
    assert cut[39].wd == pytest.approx(0.4) and cut[39].momentum == 1 and plain[39].momentum < 1
    assert cut[5].teacher_temp == plain[5].teacher_temp


def test_schedules_in_pieces():
    cfg = tiny_config([*PIECEWISE, "optim.epochs=4", "optim.scaling_rule=none", "train.OFFICIAL_EPOCH_LENGTH=10"])
    schedules = build_schedules(cfg, plan=plan_run(cfg, dataset_size=1000, world_size=1))
    lr = [schedules[step].lr for step in range(41)]
    np.testing.assert_allclose([lr[0], lr[5], lr[10], lr[29], lr[30], lr[40]], [0.1, 0.25, 0.4, 0.2, 0.2, 0.2])
    assert schedules[9].last_layer_lr == 0 and schedules[10].last_layer_lr == 0.4
    assert {schedules[step].wd for step in range(41)} == {0.04}
    assert schedules[0].momentum == 0.9 and schedules[39].momentum == 1.0
    assert schedules[10].teacher_temp == pytest.approx(0.055) and schedules[20].teacher_temp == 0.07


def test_the_weight_of_local_crops_follows_its_schedule_if_asked_for():
    schedule = [f"dino.local_loss_weight_schedule.{key}" for key in ("start=0.5", "peak=1.0", "end=0.25")]
    options = ["optim.epochs=4", "optim.warmup_epochs=0", *schedule, "dino.local_loss_weight_schedule.warmup_epochs=2"]
    on, off = (
        Schedules(tiny_config([*options, f"dino.reweight_dino_local_loss={used}"]), lr=1, end_lr=0, epoch_length=10)
        for used in ("true", "false")
    )
    assert [on[step].dino_local_loss_weight for step in (0, 10, 20, 39, 40)] == [0.5, 0.75, 1.0, 0.25, 0.25]
    assert off[0].dino_local_loss_weight == off[39].dino_local_loss_weight == 1.0


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak():
    schedule = CosineScheduler(1.0, 0.1, 10, warmup_iters=10)
    assert schedule[9] == 1.0 and schedule[10] == 0.1


@pytest.mark.parametrize(("rule", "factor"), [("sqrt_wrt_1024", 0.25), ("linear_wrt_256", 0.25), ("none", 1.0)])
def test_scaling_rules(rule, factor):
    cfg = tiny_config([f"optim.scaling_rule={rule}", "optim.base_lr=0.004", "optim.min_lr=0.001"])
    assert scaled_lr(cfg, global_batch_size=64) == (pytest.approx(0.004 * factor), 0.001)


@pytest.mark.parametrize(("rule", "factor"), [("sqrt_wrt_1024", 1.0), ("linear_wrt_256", 0.25), ("none", 1.0)])
def test_scaling_rules_act_on_peak_and_end_of_schedules_in_pieces(rule, factor):
    cfg = tiny_config([*PIECEWISE, f"optim.scaling_rule={rule}"])
    assert scaled_lr(cfg, global_batch_size=64) == (pytest.approx(0.4 * factor), pytest.approx(0.2 * factor))
