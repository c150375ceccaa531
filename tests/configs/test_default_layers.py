"""DINOv2's and DINOv3's defaults, chosen by `defaults` or recognised; how each parent gives its learning rate."""

import pytest

from dinov2.configs import Config, load_config, to_dict, write_config
from dinov2.configs.default_layers import DINOV3_DEFAULTS
from dinov2.configs.reference import reference_yaml
from dinov2.configs.tree import leaves
from dinov2.errors import ConfigError


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def differences(cfg):
    base, other = to_dict(Config()), to_dict(cfg)
    return {
        f"{section}.{key}": value
        for section, keys in other.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if value != base[section][key]
    }


def test_without_a_choice_the_defaults_are_dinov2s():
    assert load_config(None).defaults == "dinov2"
    assert load_config(None, ["defaults=dinov2"]) == load_config(None) == Config()


def test_dinov3s_defaults_differ_where_the_table_says():
    cfg = load_config(None, ["defaults=dinov3"])
    assert cfg.defaults == "dinov3" and cfg.notes == () and cfg.refusals == ()
    assert differences(cfg) == {
        "dino.head_weight_norm": False,
        "ibot.head_weight_norm": False,
        "ibot.separate_head": True,
        "train.centering": "sinkhorn_knopp",
        "student.pos_embed_type": "rope",
        "compute_precision.sharding_strategy": "FULL_SHARD",
    }


def test_a_file_of_dinov3_is_recognised(tmp_path):
    path = write(tmp_path, "MODEL: {META_ARCHITECTURE: SSLMetaArch}\n")
    assert load_config(path) == load_config(None, ["defaults=dinov3"])
    assert load_config(path, ["defaults=dinov2"]) == Config()


def test_the_file_may_choose_and_its_values_lie_over_the_layer(tmp_path):
    path = write(tmp_path, "defaults: dinov3\nibot: {separate_head: false}\n")
    cfg = load_config(path)
    assert (cfg.ibot.separate_head, cfg.dino.head_weight_norm) == (False, False)
    assert load_config(path, ["defaults=dinov2"]).dino.head_weight_norm is True


@pytest.mark.parametrize("value", ["dinov4", "[_self_]", "null"])
def test_other_layers_are_unknown(value):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"defaults={value}"])
    shown = "null" if value == "null" else repr(value)
    assert str(caught.value) == f"defaults={shown}: must be one of dinov2, dinov3"


def test_an_unknown_architecture_of_the_whole_is_an_error():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["MODEL.META_ARCHITECTURE=MyArch"])
    assert str(caught.value) == (
        "MODEL.META_ARCHITECTURE='MyArch': must be one of SSLMetaArch, MultiDistillationMetaArch"
    )


@pytest.mark.parametrize(
    ("overrides", "base_lr"),
    [
        ([], 0.004),
        (["optim.lr=0.0002"], 0.0008),
        (["optim.lr=0.0002", "optim.scaling_rule=linear_wrt_256"], 0.0002),
        (["optim.scaling_rule=none"], 0.001),
        (["optim.base_lr=0.01"], 0.01),
    ],
)
def test_dinov3_gives_the_learning_rate_by_lr(overrides, base_lr):
    cfg = load_config(None, ["defaults=dinov3", *overrides])
    assert cfg.optim.base_lr == pytest.approx(base_lr, rel=1e-12)
    assert cfg.notes == ()


def test_of_lr_and_base_lr_the_later_layer_wins(tmp_path):
    path = write(tmp_path, "defaults: dinov3\noptim: {lr: 0.001}\n")
    assert load_config(path, ["optim.base_lr=0.02"]).optim.base_lr == 0.02
    path = write(tmp_path, "defaults: dinov3\noptim: {base_lr: 0.001}\n")
    assert load_config(path, ["optim.lr=0.02"]).optim.base_lr == 0.08


def test_with_base_lr_in_the_same_file_lr_is_output(tmp_path):
    path = write(tmp_path, "defaults: dinov3\noptim: {base_lr: 0.001, lr: 0.0003}\n")
    cfg = load_config(path)
    assert cfg.optim.base_lr == 0.001
    assert cfg.notes == ("optim.base_lr=0.001 overrules 0.0012 from its older names",)


def test_what_is_written_keeps_its_layer(tmp_path):
    cfg = load_config(None, ["defaults=dinov3", "optim.lr=0.0002"])
    write_config(cfg, tmp_path / "written.yaml")
    again = load_config(str(tmp_path / "written.yaml"))
    assert again == cfg and again.notes == ()
    assert load_config(str(tmp_path / "written.yaml"), ["optim.lr=0.0001"]).optim.base_lr == 0.0004


def test_dinov3_does_not_save_by_saveckp_freq():
    cfg = load_config(None, ["defaults=dinov3", "train.saveckp_freq=2"])
    assert cfg.checkpointing.period == 3750
    assert cfg.notes == ("train.saveckp_freq=2 has no effect: DINOv3 saves by checkpointing.period",)


def test_the_reference_names_each_default_of_dinov3():
    text = reference_yaml()
    assert text.count("DINOv3: ") == len(DINOV3_DEFAULTS.keys() & leaves().keys()) == len(DINOV3_DEFAULTS) - 1
    assert "optim.base_lr: base_lr is 4 * lr with scaling_rule sqrt_wrt_1024" in text
