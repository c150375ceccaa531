import numpy as np
import pytest
from support.golden import load_golden
from support.meta_arch import tiny_config

from dinov2.train.schedules import CosineScheduler, Schedules, scaled_lr


@pytest.mark.parametrize(("name", "freeze_iters"), [("cosine", 0), ("cosine_freeze", 5)])
def test_cosine_equals_the_official_schedule(name, freeze_iters):
    expected = load_golden("schedules_v3")[name]
    schedule = CosineScheduler(1e-3, 1e-6, 50, warmup_iters=10, freeze_iters=freeze_iters)
    np.testing.assert_allclose([schedule[i] for i in range(50)], expected, rtol=1e-12)
    assert schedule[50] == schedule[5000] == 1e-6


def test_epochs_become_steps_and_the_last_layer_waits():
    cfg = tiny_config(
        [
            "optim.epochs=4",
            "optim.warmup_epochs=1",
            "optim.freeze_last_layer_epochs=2",
            "teacher.warmup_teacher_temp_epochs=2",
        ]
    )
    schedules = Schedules(cfg, lr=0.5, epoch_length=10)
    assert schedules[0].lr == 0 and schedules[10].lr == 0.5 and schedules[40].lr == cfg.optim.min_lr
    assert schedules[19].last_layer_lr == 0 and schedules[20].last_layer_lr == schedules[20].lr
    assert schedules[0].teacher_temp == pytest.approx(0.04) and schedules[20].teacher_temp == pytest.approx(0.07)
    assert schedules[0].momentum == pytest.approx(0.992) and schedules[40].momentum == 1
    assert schedules[0].wd == pytest.approx(0.04) and schedules[40].wd == pytest.approx(0.4)


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak():
    schedule = CosineScheduler(1.0, 0.1, 10, warmup_iters=10)
    assert schedule[9] == 1.0 and schedule[10] == 0.1


@pytest.mark.parametrize(("rule", "factor"), [("sqrt_wrt_1024", 0.25), ("linear_wrt_256", 0.25), ("none", 1.0)])
def test_scaling_rules(rule, factor):
    assert scaled_lr(0.004, rule=rule, global_batch_size=64) == pytest.approx(0.004 * factor)
