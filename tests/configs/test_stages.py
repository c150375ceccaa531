"""Stages of a run: what they may set, the sentence where they may not, and the whole settings of each."""

import json
from pathlib import Path

import pytest

from dinov2.configs import load_config, stage_configs, to_dict, write_config
from dinov2.configs.changes import changed_settings
from dinov2.errors import ConfigError

TWO = "stages=[{name: heads, epochs: 12, optim: {base_lr: 1e-3}}, {name: wide, crops.global_crops_size: 448}]"


def sentence(*overrides, file=None):
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def values_of(cfg, read):
    return {name: read(settings) for name, settings in stage_configs(cfg)}


def test_without_stages_the_config_is_the_only_one():
    cfg = load_config(None)
    assert stage_configs(cfg) == [("", cfg)] and to_dict(cfg)["stages"] == []


def test_a_stage_is_the_base_with_its_own_keys():
    cfg = load_config(None, [TWO, "optim.epochs=50", "optim.min_lr=0"])
    assert [stage.keys for stage in cfg.stages] == [
        {"optim.epochs": 12, "optim.base_lr": 0.001},
        {"crops.global_crops_size": 448},
    ]
    read = values_of(cfg, lambda s: (s.optim.epochs, s.optim.base_lr, s.optim.min_lr, s.crops.global_crops_size))
    assert read == {"heads": (12, 0.001, 0, 224), "wide": (50, 0.004, 0, 448)}
    assert cfg.optim.epochs == 50 and all(settings.stages == () for _, settings in stage_configs(cfg))


def test_the_command_line_reaches_into_a_stage_of_a_file(tmp_path):
    path = str(tmp_path / "config.yaml")
    cfg = load_config(None, [TWO, "defaults=dinov3"])
    write_config(cfg, path)
    assert load_config(path) == cfg
    changed = load_config(path, ["stages.heads.epochs=20", "stages.wide.optim.scaling_rule=none", "optim.base_lr=2"])
    read = values_of(changed, lambda s: (s.optim.epochs, s.optim.base_lr, s.optim.scaling_rule))
    assert read == {"heads": (20, 0.001, "sqrt_wrt_1024"), "wide": (100, 2.0, "none")}
    assert load_config(path, ["stages=[]"]).stages == ()
    assert sentence("stages.head.epochs=3", file=path) == (
        "stages.head.epochs=3 on the command line: must be stages.<name>.<key>; the stages are heads, wide"
    )


def test_names_of_the_parents_are_translated_in_a_stage():
    cfg = load_config(
        None,
        [
            "defaults=dinov3",
            "stages=[{name: a, optim.lr: 0.0005, crops.horizontal_flips: false, train.cudagraphs: true}]",
        ],
    )
    (stage,) = cfg.stages
    assert stage.keys == {"optim.base_lr": 0.002, "augmentation.horizontal_flip_probability": 0.0}
    assert cfg.notes == ("stage a: train.cudagraphs=true has no effect: train.compile_mode decides",)


def test_a_stage_may_have_schedules_in_pieces_or_take_them_back():
    piece = "{start: 0.1, peak: 0.1, end: 0.1, warmup_epochs: 0}"
    names = ("lr", "weight_decay", "momentum", "teacher_temp")
    schedules = ", ".join(f"{name}: {piece}" for name in names)
    cfg = load_config(None, [f"stages=[{{name: a}}, {{name: b, schedules: {{{schedules}}}}}]"])
    assert values_of(cfg, lambda s: s.schedules is None) == {"a": True, "b": False}
    cfg = load_config(
        None, [*(f"schedules.{name}={piece}" for name in names), "stages=[{name: a}, {name: b, schedules: null}]"]
    )
    assert values_of(cfg, lambda s: s.schedules is None) == {"a": False, "b": True}
    assert values_of(cfg, lambda s: s.optim.base_lr) == {"a": 0.004, "b": 0.004}
    assert to_dict(cfg)["stages"] == [{"name": "a"}, {"name": "b", "schedules": None}]


OF_NETWORKS = "cannot differ between stages: networks are built once; set it outside of stages"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("student.depth: 3", f"stage a: student.depth {OF_NETWORKS}"),
        ("dino.head_nlayers: 1", f"stage a: dino.head_nlayers {OF_NETWORKS}"),
        ("lora.rank: 4", f"stage a: lora.rank {OF_NETWORKS}"),
        (
            "optim.freeze: [norms]",
            "stage a: optim.freeze cannot differ between stages: parts rest for the whole run; "
            "optim.freeze_backbone_epochs may differ; set it outside of stages",
        ),
        (
            "optim: {optimizer: sgd}",
            "stage a: optim.optimizer cannot differ between stages: the optimiser is built once and keeps what it has "
            "gathered; set it outside of stages",
        ),
        (
            "train.seed: 1",
            "stage a: train.seed cannot differ between stages: it holds for the whole run; set it outside of stages",
        ),
        ("epochs: 1", "stage a: optim.warmup_epochs=10: must be in 0..1, the value of optim.epochs"),
        ("epochs: 12, optim.epochs: 12", "stage a: optim.epochs is given twice; give it once"),
        ("optim.epoch: 1", "unknown key optim.epoch in stage a; the nearest known key is optim.epochs"),
        (
            "crops.global_crops_size: 100",
            "stage a: crops.global_crops_size=100 is not a multiple of student.patch_size=16; use 96 or 112",
        ),
        ("optim.base_lr: fast", "stage a: optim.base_lr='fast': must be a number"),
    ],
)
def test_a_key_that_a_stage_cannot_have(keys, expected):
    assert sentence(f"stages=[{{name: a, {keys}}}]") == expected


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("5", "stages=5: must be a list, e.g. [{name: heads, epochs: 2}]"),
        ("[heads]", "stages: 'heads' must be a mapping of name, epochs and keys"),
        ("[{epochs: 2}]", "stages: name=null of stage 1: must be letters, digits, - and _"),
        ("[{name: a b}]", "stages: name='a b' of stage 1: must be letters, digits, - and _"),
        ("[{name: a}, {name: a}]", "stages: two stages have the name a; give each its own"),
    ],
)
def test_a_list_that_is_none_of_stages(stages, expected):
    assert sentence(f"stages={stages}") == expected


NEEDS = "needs a network that is built only if it is above 0 outside of stages"


def test_a_loss_whose_network_is_not_built_cannot_be_turned_on():
    options = ["ibot.separate_head=true", "ibot.loss_weight=0", "stages=[{name: a, ibot.loss_weight: 1}]"]
    assert sentence(*options) == (
        f"stage a: ibot.loss_weight=1.0 {NEEDS}; set it there, and to 0 in the stages that are to do without"
    )
    assert load_config(None, options[1:]).stages
    assert sentence("stages=[{name: a, anchor.cls_weight: 2}]").startswith(f"stage a: anchor.cls_weight=2.0 {NEEDS}")
    assert load_config(None, ["anchor.patch_weight=1", "stages=[{name: a, anchor.cls_weight: 2}]"]).stages


def test_the_batch_of_a_process_beside_a_global_one():
    options = ["train.global_batch_size=64", "stages=[{name: a, train.batch_size_per_gpu: 3}]"]
    assert sentence(*options) == (
        "stage a: train.batch_size_per_gpu=3 is overruled by train.global_batch_size=64; set train.global_batch_size "
        "in the stage"
    )
    assert load_config(None, [*options, "stages.a.train.global_batch_size=null"]).stages


def test_changes_of_stages_are_named_by_stage_and_key():
    saved = json.loads(json.dumps(to_dict(load_config(None, [TWO]))))
    same = [TWO, "stages.heads.evaluation.eval_period_iterations=3", "stages.wide.train.batch_size_per_gpu=3"]
    assert changed_settings(saved, to_dict(load_config(None, same))) == []
    running = load_config(None, [TWO, "stages.heads.optim.base_lr=0.002", "stages.wide.optim.min_lr=0"])
    assert changed_settings(saved, to_dict(running)) == [
        "stages.heads.optim.base_lr 0.001 -> 0.002",
        "stages.wide.optim.min_lr 1e-06 -> 0.0",
    ]
    running = load_config(None, ["stages=[{name: heads, epochs: 12, optim.base_lr: 1e-3}, {name: end}]"])
    assert changed_settings(saved, to_dict(running)) == [
        'stages.wide {"name": "wide", "crops": {"global_crops_size": 448}} -> null',
        'stages.end null -> {"name": "end"}',
    ]


def test_the_example_of_the_guide_loads(tmp_path):
    guide = (Path(__file__).resolve().parents[2] / "docs" / "stages.md").read_text(encoding="utf-8")
    (tmp_path / "example.yaml").write_text(guide.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    cfg = load_config(str(tmp_path / "example.yaml"), ["stages.adapt.epochs=5", "stages.large.optim.base_lr=1e-5"])
    read = values_of(cfg, lambda s: (s.optim.epochs, s.optim.base_lr, s.crops.global_crops_size, s.gram.loss_weight))
    assert read == {"heads": (2, 1e-3, 112, 0), "adapt": (5, 2e-4, 112, 0), "large": (3, 1e-5, 224, 1)}
    assert cfg.notes == cfg.refusals == ()
