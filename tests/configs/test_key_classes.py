"""The table of the parents' keys: honoured ones change the settings, others are said to have no effect or refused."""

import pytest
import yaml

from dinov2.configs import Config, load_config, write_config
from dinov2.configs.parent_keys import PARENT_KEYS
from dinov2.configs.tree import leaves
from dinov2.errors import ConfigError

V3 = "defaults=dinov3"
# For each honoured key a value, what it becomes, and that value; DINOv2's keys per module are in test_parent_keys.py.
HONOURED = {
    "train.saveckp_freq": ("3", "checkpointing.period", 3750),
    "train.fsdp_reshard_after_forward": ("true", "compute_precision.sharding_strategy", "FULL_SHARD"),
    "student.n_storage_tokens": ("4", "student.num_register_tokens", 4),
    "student.resume_from_teacher_chkpt": ("a b.pth", "MODEL.WEIGHTS", "a b.pth"),
    "crops.horizontal_flips": ("false", "augmentation.horizontal_flip_probability", 0.0),
    "MODEL.META_ARCHITECTURE": ("SSLMetaArch", "defaults", "dinov3"),
}


def of_kind(kind):
    per_module = ("compute_precision.student.", "compute_precision.teacher.")
    return sorted(key for key, entry in PARENT_KEYS.items() if entry.kind == kind and not key.startswith(per_module))


def at(cfg, key):
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def load_one(folder, key, value):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value}))
    return load_config(str(path))


def loud_value(key):
    """Return a value of the right type that asks for something else than what happens here; None if there is none."""
    candidates = [True, False, 7, 0.7, "area", [0.7]]
    for value in candidates:
        try:
            cfg = load_config(None, [f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"])
        except ConfigError:
            continue
        if cfg.notes or cfg.refusals:
            return value
    return None


def test_no_key_is_in_two_classes():
    assert PARENT_KEYS.keys().isdisjoint(leaves())


def test_each_honoured_key_has_a_case():
    tested_elsewhere = {"optim.lr", "crops.rgb_mean", "crops.rgb_std"}
    assert HONOURED.keys() | tested_elsewhere == set(of_kind("honoured"))


@pytest.mark.parametrize("key", HONOURED)
def test_an_honoured_key_becomes_ours(key):
    value, ours, arrived = HONOURED[key]
    cfg = load_config(None, [f"{key}={value}"])
    assert at(cfg, ours) == arrived
    assert (cfg.notes, cfg.refusals) == ((), ())


def test_statistics_of_channels_become_ours():
    cfg = load_config(None, ["student.in_chans=1", "crops.rgb_mean=[0.3]", "crops.rgb_std=[0.2]"])
    assert (cfg.augmentation.mean, cfg.augmentation.std) == ((0.3,), (0.2,))


def test_other_values_of_honoured_keys():
    cfg = load_config(None, ["train.fsdp_reshard_after_forward=false", "crops.horizontal_flips=true"])
    assert cfg.compute_precision.sharding_strategy == "SHARD_GRAD_OP"
    assert cfg.augmentation.horizontal_flip_probability == 0.5
    assert load_config(None, ["student.resume_from_teacher_chkpt="]) == Config()


def test_weights_under_both_names(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("MODEL: {WEIGHTS: ''}\nstudent: {resume_from_teacher_chkpt: a.pth}\n")
    assert load_config(str(path)).MODEL.WEIGHTS == "a.pth"
    assert load_config(str(path), ["MODEL.WEIGHTS=b.pth"]).MODEL.WEIGHTS == "b.pth"
    assert load_config(str(path), ["MODEL.WEIGHTS="]).MODEL.WEIGHTS == ""
    assert load_config(str(path), ["student.resume_from_teacher_chkpt=c.pth"]).MODEL.WEIGHTS == "c.pth"


@pytest.mark.parametrize("key", of_kind("without effect"))
def test_a_key_without_effect_changes_nothing_and_says_so(key):
    reason = PARENT_KEYS[key].reason
    value = loud_value(key)
    if value is None:
        assert reason.startswith(("belongs to ", "evaluations are ", "file lists ")), key
        return
    cfg = load_config(None, [f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"])
    assert cfg == Config() and cfg.refusals == ()
    (note,) = cfg.notes
    assert note.startswith(f"{key}=") and note.endswith(f" has no effect: {reason}")


@pytest.mark.parametrize("key", of_kind("refused"))
def test_a_refused_key_loads_and_is_refused_in_training(key):
    value = loud_value(key)
    cfg = load_config(None, [f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"])
    assert cfg == Config() and cfg.notes == ()
    (refusal,) = cfg.refusals
    assert refusal.startswith(f"{key}=")
    assert refusal.endswith(f" is not supported in training: {PARENT_KEYS[key].reason}")


@pytest.mark.parametrize("key", sorted(key for key, entry in PARENT_KEYS.items() if entry.annotation is not None))
def test_a_value_of_the_wrong_kind_is_found_at_once(key, tmp_path):
    if key in ("multidistillation.students", "train.data_config", "train.chunk_schedule"):  # of any kind
        assert load_one(tmp_path, key, {"a": 1}) == Config()
        return
    with pytest.raises(ConfigError) as caught:
        load_one(tmp_path, key, {"a": 1})
    assert str(caught.value).startswith(f"{key}={{'a': 1}}: must be ")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("gram.tokens_used=some", "gram.tokens_used='some': must be one of all, masked, unmasked"),
        ("gram.loss_weight=much", "gram.loss_weight='much': must be a number"),
        (
            "gram.loss_weight_schedule={start: 0, peak: 1, end: 1, warmup_epochs: 1.5}",
            "gram.loss_weight_schedule.warmup_epochs=1.5: must be an integer",
        ),
        ("crops.gram_teacher_crops_size=[512, a]", "crops.gram_teacher_crops_size='a': must be an integer or null"),
        (
            "gram.loss_weight_schedule.start=0.5",
            "gram.loss_weight_schedule.peak is not set: it has no default",
        ),
        ("crops.global_crops_size=[512, a]", "crops.global_crops_size='a': must be an integer"),
        ("crops.global_crops_size=[]", "crops.global_crops_size=[]: must be an integer"),
        ("student.pos_embed_type=ropeold", "student.pos_embed_type='ropeold': must be one of learned, rope"),
        ("student.sparse24_ranges=3", "student.sparse24_ranges=3: must be a list"),
    ],
)
def test_mistakes_in_values_and_lists(override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert str(caught.value) == expected


def test_a_list_of_one_crop_size_is_that_size():
    cfg = load_config(None, ["crops.global_crops_size=[256]", "crops.local_crops_size=[112]"])
    assert (cfg.crops.global_crops_size, cfg.crops.local_crops_size, cfg.refusals) == (256, 112, ())


def test_of_several_crop_sizes_the_first_is_kept_and_training_refused():
    cfg = load_config(None, ["crops.local_crops_size=[112, 224]"])
    assert cfg.crops.local_crops_size == 112
    assert cfg.refusals == (
        "crops.local_crops_size=[112, 224] is not supported in training: crops have one size; give one number",
    )


def test_the_weight_of_gram_is_null_or_a_schedule(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("gram:\n  loss_weight_schedule:\n")
    assert load_config(str(path)) == Config()
    path.write_text("gram: {use_loss: true, loss_weight_schedule: {start: 0, peak: 1, end: 2.0, warmup_epochs: 3}}\n")
    cfg = load_config(str(path))
    schedule = cfg.gram.loss_weight_schedule
    assert (schedule.start, schedule.peak, schedule.end, schedule.warmup_epochs) == (0.0, 1.0, 2.0, 3)
    assert schedule.cosine_epochs is None and cfg.notes == ()
    write_config(cfg, tmp_path / "written.yaml")
    assert load_config(str(tmp_path / "written.yaml")) == cfg
    assert load_config(str(path), ["gram.loss_weight_schedule=null"]).gram.loss_weight_schedule is None


@pytest.mark.parametrize(
    ("setting", "others", "reason"),
    [
        ("student.pos_embed_rope_jitter_coords=1.5", [], "student.pos_embed_type=learned has no such part"),
        (
            "student.mask_k_bias=true",
            ["student.arch=resnet18", "ibot.loss_weight=0"],
            "student.arch=resnet18 is no ViT",
        ),
        ("student.untie_global_and_local_cls_norm=true", ["crops.local_crops_number=0"], "there are no local crops"),
        ("dino.local_loss_weight_schedule.start=0.3", [], "dino.reweight_dino_local_loss=false"),
        ("gram.loss_weight=2.0", [], "gram.use_loss=false"),
        (
            "gram.loss_weight=2.0",
            ["gram.use_loss=true", "gram.loss_weight_schedule={start: 0, peak: 1, end: 1, warmup_epochs: 0}"],
            "gram.loss_weight_schedule is set",
        ),
        ("dino.koleo_distributed_loss_group_size=4", [], "dino.koleo_loss_distributed=false"),
        ("train.compile_mode='reduce-overhead'", [], "train.compile=false"),
        ("train.compile_target='student'", [], "train.compile=false"),
        (
            "train.compile=true",
            ["student.arch=resnet18", "ibot.loss_weight=0"],
            "student.arch=resnet18 is no ViT",
        ),
        ("compute_precision.hybrid_shard_size=4", [], "compute_precision.sharding_strategy is not HYBRID_SHARD"),
    ],
)
def test_a_setting_that_another_one_makes_idle_is_noted(setting, others, reason):
    assert load_config(None, [setting, *others]).notes == (f"{setting} has no effect: {reason}",)


def test_defaults_that_rest_are_not_spoken_of(tmp_path):
    resnet = ["student.arch=resnet18", "ibot.loss_weight=0"]
    for settings in ([], [V3], resnet, [*resnet, V3], ["student.pos_embed_rope_base=100"]):
        cfg = load_config(None, settings)
        write_config(cfg, tmp_path / "config.yaml")
        assert (cfg.notes, load_config(str(tmp_path / "config.yaml")).notes) == ((), ())
