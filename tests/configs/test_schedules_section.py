"""The optional section `schedules`: all of it or none, and nulls of the keys that it replaces."""

import pytest

from dinov2.configs import Config, load_config, write_config
from dinov2.configs.parent_keys import REPLACED_BY_SCHEDULES
from dinov2.errors import ConfigError

FULL = """
schedules:
  lr: {start: 0, peak: 1e-3, end: 1e-6, warmup_epochs: 10, freeze_last_layer_epochs: 2}
  weight_decay: {start: 0.04, peak: 0.04, end: 0.2, warmup_epochs: 0}
  momentum: {start: 0.99, peak: 0.99, end: 1, warmup_epochs: 0, cosine_epochs: 50}
  teacher_temp: {start: 0.04, peak: 0.07, end: 0.07, warmup_epochs: 30}
"""


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def sentence(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_there_are_none_by_default():
    assert Config().schedules is None


def test_all_values_arrive_and_are_written(tmp_path):
    cfg = load_config(write(tmp_path, FULL), ["schedules.lr.peak=2e-3"])
    assert (cfg.schedules.lr.peak, cfg.schedules.lr.freeze_last_layer_epochs) == (2e-3, 2)
    assert (cfg.schedules.momentum.end, cfg.schedules.momentum.cosine_epochs) == (1.0, 50)
    assert cfg.schedules.weight_decay.cosine_epochs is None
    write_config(cfg, tmp_path / "written.yaml")
    assert load_config(str(tmp_path / "written.yaml")) == cfg


def test_the_command_line_can_take_them_back(tmp_path):
    assert load_config(write(tmp_path, FULL), ["schedules=null"]) == Config()


def test_nulls_of_what_they_replace_are_defaults(tmp_path):
    nulls = "".join(f"{key}: null\n" for key in REPLACED_BY_SCHEDULES)
    cfg = load_config(write(tmp_path, nulls + FULL))
    assert (cfg.optim, cfg.teacher) == (Config().optim, Config().teacher)
    assert sentence(write(tmp_path, "teacher: {teacher_temp: null}\n")) == "teacher.teacher_temp=null: must be a number"


def test_the_warmup_they_replace_need_not_fit(tmp_path):
    cfg = load_config(write(tmp_path, FULL), ["optim.epochs=80", "optim.warmup_epochs=90"])
    assert cfg.optim.warmup_epochs == 90


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("schedules.lr.peak=-1", "schedules.lr.peak=-1.0: must be at least 0"),
        ("schedules.lr.freeze_last_layer_epochs=-1", "schedules.lr.freeze_last_layer_epochs=-1: must be at least 0"),
        ("schedules.momentum.peak=1.5", "schedules.momentum.peak=1.5: must be in 0..1"),
        ("schedules.teacher_temp.start=0", "schedules.teacher_temp.start=0.0: must be above 0"),
        (
            "schedules.weight_decay.cosine_epochs=-1",
            "schedules.weight_decay.cosine_epochs=-1: must be at least 0, or null",
        ),
        ("schedules.lr.start=null", "schedules.lr.start=null: must be a number"),
        (
            "optim.epochs=20",
            "schedules.momentum.warmup_epochs=0 and cosine_epochs=50 go beyond the end of the run at optim.epochs=20; "
            "shorten them",
        ),
    ],
)
def test_wrong_values(tmp_path, override, expected):
    assert sentence(write(tmp_path, FULL), [override]) == expected


def test_part_of_them_is_not_enough():
    assert sentence(None, ["schedules.lr.start=0"]) == (
        "schedules.weight_decay.start is not set: whoever sets a key of schedules must set all of its sections: "
        "lr, weight_decay, momentum, teacher_temp"
    )
    lacking = [line for line in FULL.splitlines() if "lr:" not in line]
    overrides = [f"schedules.{line.strip().replace(': ', '=', 1)}" for line in lacking if "{" in line]
    assert sentence(None, [*overrides, "schedules.lr={start: 0, end: 0, warmup_epochs: 1}"]) == (
        "schedules.lr.peak is not set: it has no default"
    )
