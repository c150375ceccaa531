"""Defaults, YAML file and key=value arguments, laid over each other."""

import dataclasses

import pytest

from dinov2.configs import Config, load_config


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_file_and_overrides_the_defaults_are_dinov2s():
    cfg = load_config(None)
    assert cfg == Config()
    assert (cfg.student.arch, cfg.student.patch_size, cfg.student.layerscale) == ("vit_large", 16, 1e-5)
    assert (cfg.dino.head_n_prototypes, cfg.ibot.mask_ratio_min_max) == (65536, (0.1, 0.5))
    assert (cfg.optim.base_lr, cfg.optim.scaling_rule, cfg.optim.epochs) == (0.004, "sqrt_wrt_1024", 100)
    assert (cfg.crops.global_crops_scale, cfg.crops.local_crops_number) == ((0.32, 1.0), 8)
    assert cfg.evaluation.knn.nb_knn == (10, 20, 100, 200)


def test_file_lies_over_defaults_and_overrides_over_both(tmp_path):
    path = write(tmp_path, "optim:\n  epochs: 20\n  base_lr: 1e-3\ntrain:\n  seed: 3\n")
    cfg = load_config(path, ["optim.epochs=30", "evaluation.knn.batch_size=8"])
    assert (cfg.optim.epochs, cfg.optim.base_lr, cfg.train.seed) == (30, 1e-3, 3)
    assert cfg.optim.weight_decay == 0.04
    assert cfg.evaluation.knn.batch_size == 8


def test_of_a_key_given_twice_the_last_wins(tmp_path):
    path = write(tmp_path, "train:\n  seed: 1\n  seed: 2\n")
    assert load_config(path).train.seed == 2
    assert load_config(path, ["train.seed=3", "train.seed=4"]).train.seed == 4


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "evaluation:\n  knn:\n"])
def test_empty_files_and_empty_sections_say_nothing(tmp_path, text):
    assert load_config(write(tmp_path, text)) == Config()


def test_lists_come_out_as_tuples(tmp_path):
    path = write(tmp_path, "crops:\n  global_crops_scale:\n  - 0.5\n  - 1\nevaluation: {knn: {nb_knn: [5]}}\n")
    cfg = load_config(path)
    assert cfg.crops.global_crops_scale == (0.5, 1.0)
    assert cfg.evaluation.knn.nb_knn == (5,)
    assert hash(cfg) == hash(load_config(path))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.base_lr=1e-4", "optim", "base_lr", 1e-4),
        ("optim.base_lr=.5E-3", "optim", "base_lr", 5e-4),
        ("optim.base_lr=1", "optim", "base_lr", 1.0),
        ("optim.clip_grad=null", "optim", "clip_grad", None),
        ("train.seed=1e3", "train", "seed", 1000),
        ("train.resume=false", "train", "resume", False),
        ("train.OFFICIAL_EPOCH_LENGTH=null", "train", "OFFICIAL_EPOCH_LENGTH", None),
        ("crops.local_crops_scale=[0.1, 0.2]", "crops", "local_crops_scale", (0.1, 0.2)),
        ("optim={epochs: 12}", "optim", "epochs", 12),
    ],
)
def test_override_values_are_read_as_yaml(override, section, key, value):
    got = getattr(getattr(load_config(None, [override]), section), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ImageFolder:root=my photos #2", "ImageFolder:root=my photos #2"),
        ("ImageFolder:root='C:\\photos'", "ImageFolder:root='C:\\photos'"),
        ("'a: b'", "a: b"),
        ("2024", "2024"),
        ("2024-01-31", "2024-01-31"),
        ("1e-3", "1e-3"),
        ("true", "true"),
        ("[a", "[a"),
        ("", ""),
        ("null", ""),
    ],
)
def test_text_on_the_command_line_needs_no_quotes(text, value):
    assert load_config(None, [f"train.dataset_path={text}"]).train.dataset_path == value


@pytest.mark.parametrize("text", ["", "null", "~", "''"])
def test_empty_text_means_null_where_null_is_allowed(text):
    assert load_config(None, [f"train.resume_path={text}"]).train.resume_path is None


def test_dates_in_files_stay_text(tmp_path):
    path = write(tmp_path, "train:\n  output_dir: 2024-01-31\n")
    assert load_config(path).train.output_dir == "2024-01-31"


def test_anchors_and_dotted_keys_work_in_files(tmp_path):
    text = "dino: &head {head_nlayers: 2}\nibot:\n  <<: *head\n  separate_head: true\noptim.epochs: 11\n"
    cfg = load_config(write(tmp_path, text))
    assert (cfg.dino.head_nlayers, cfg.ibot.head_nlayers, cfg.optim.epochs) == (2, 2, 11)


def test_values_refer_to_other_keys_defaults_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOS", "/data/photos")
    text = (
        "train:\n  dataset_path: ImageFolder:root=${oc.env:PHOTOS}\n  num_workers: 3\n"
        "evaluation: {knn: {image_size_px: '${crops.global_crops_size}', batch_size: '${train.num_workers}'}}\n"
    )
    cfg = load_config(write(tmp_path, text))
    assert cfg.train.dataset_path == "ImageFolder:root=/data/photos"
    assert (cfg.evaluation.knn.image_size_px, cfg.evaluation.knn.batch_size) == (224, 3)


def test_the_tree_cannot_be_changed():
    cfg = load_config(None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.train.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.train = None
