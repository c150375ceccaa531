"""A wrong file, key or value ends in one exact sentence and exit code 2."""

import pytest

from dinov2.configs import batch_size_per_rank, load_config, require_train_dataset
from dinov2.errors import ConfigError


def sentence(config_file, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.epochs=abc", "optim.epochs='abc': must be an integer"),
        ("optim.epochs=1.5", "optim.epochs=1.5: must be an integer"),
        ("optim.epochs=true", "optim.epochs=true: must be an integer"),
        ("optim.epochs=", "optim.epochs=null: must be an integer"),
        ("optim.epochs={a: 1}", "optim.epochs={'a': 1}: must be an integer"),
        ("train.max_steps=x", "train.max_steps='x': must be an integer or null"),
        ("optim.base_lr=fast", "optim.base_lr='fast': must be a number"),
        ("optim.base_lr=.nan", "optim.base_lr=nan: must be a number"),
        ("optim.base_lr=.inf", "optim.base_lr=inf: must be a number"),
        ("train.resume=1", "train.resume=1: must be true or false"),
        ("crops.local_crops_scale=[0.3]", "crops.local_crops_scale=[0.3]: must be a list of 2 numbers"),
        ("crops.local_crops_scale=0.3", "crops.local_crops_scale=0.3: must be a list of 2 numbers"),
        ("evaluation.knn.nb_knn=[5, x]", "evaluation.knn.nb_knn=[5, 'x']: must be a list of integers"),
        ("augmentation.mean=[a]", "augmentation.mean=['a']: must be a list of numbers or null"),
        ("train.centering=mean", "train.centering='mean': must be one of centering, sinkhorn_knopp"),
        (
            "train.compile_mode=fast",
            "train.compile_mode='fast': must be one of default, reduce-overhead, max-autotune-no-cudagraphs",
        ),
        ("train.compile_target=all", "train.compile_target='all': must be one of student, teacher, both"),
        ("optim.optimizer=null", "optim.optimizer=null: must be one of adamw, adam, sgd"),
        ("compute_precision.device=gpu", "compute_precision.device='gpu': must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_wrong_types(override, expected):
    assert sentence(None, [override]) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.epoch=3", "unknown key optim.epoch on the command line; the nearest known key is optim.epochs"),
        ("epochs=3", "unknown key epochs on the command line; the nearest known key is optim.epochs"),
        (
            "batch_size_per_gpu=3",
            "unknown key batch_size_per_gpu on the command line; the nearest known key is train.batch_size_per_gpu",
        ),
        (
            "crops.global_crop_size=98",
            "unknown key crops.global_crop_size on the command line; the nearest known key is crops.global_crops_size",
        ),
        (
            "evaluation.nb_knn=[3]",
            "unknown key evaluation.nb_knn on the command line; the nearest known key is evaluation.knn.nb_knn",
        ),
        (
            "train.saveckp_freqs=3",
            "unknown key train.saveckp_freqs on the command line; the nearest known key is train.saveckp_freq",
        ),
        (
            "student.rope_base=3",
            "unknown key student.rope_base on the command line; the nearest known key is student.pos_embed_rope_base",
        ),
        ("train.lr=3", "unknown key train.lr on the command line; the nearest known key is optim.lr"),
        ("model.weights=a", "unknown key model.weights on the command line; the nearest known key is MODEL.WEIGHTS"),
        (
            "gram.loss_weights=3",
            "unknown key gram.loss_weights on the command line; the nearest known key is gram.loss_weight",
        ),
        (
            "ibot.koleo_topk=3",
            "unknown key ibot.koleo_topk on the command line; the nearest known key is dino.koleo_topk",
        ),
        ("gram=3", "gram=3 on the command line: is a section; set its keys, e.g. gram.use_loss"),
        ("schedules=3", "schedules=3 on the command line: is a section; set its keys, e.g. schedules.lr.start"),
        ("optim=3", "optim=3 on the command line: is a section; set its keys, e.g. optim.optimizer"),
        ("optim.epochs", "argument 'optim.epochs': must be written key=value, e.g. optim.epochs=10"),
        ("=3", "argument '=3': must be written key=value, e.g. optim.epochs=10"),
        ("optim.epochs=[1", "argument 'optim.epochs=[1': the value is not valid YAML"),
        (
            "train.dataset_path=${train.datset}",
            "train.dataset_path='${train.datset}': cannot be resolved (Interpolation key 'train.datset' not found)",
        ),
        ("optim.epochs=???", "optim.epochs='???': cannot be resolved (Missing mandatory value: epochs)"),
    ],
)
def test_wrong_arguments(override, expected):
    assert sentence(None, [override]) == expected


def test_missing_file(tmp_path):
    path = str(tmp_path / "none.yaml")
    assert sentence(path) == f"{path}: no such config file"


def test_folder_for_a_file(tmp_path):
    assert sentence(str(tmp_path)) == f"{tmp_path}: cannot be read as a config file (Is a directory)"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"train:\n  seed: [1\noptim: 2\n", 3),
        (b"train:\n\tseed: 1\n", 2),
        (b"a: 1\n---\nb: 2\n", 2),
        (b"train: !!python/object/apply:os.getcwd []\n", 1),
    ],
)
def test_broken_yaml_names_the_line(tmp_path, content, line):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    text = sentence(str(path))
    assert text.startswith(f"{path}:{line}: is not valid YAML (") and "\n" not in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- 1\n- 2\n", "must hold sections with keys such as 'train: {seed: 0}', not a list"),
        (b"hello\n", "must hold sections with keys such as 'train: {seed: 0}', not a single value"),
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
    ],
)
def test_files_that_hold_no_settings(tmp_path, content, expected):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert sentence(str(path)) == f"{path}: {expected}"


def test_control_characters_in_a_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(b"train:\n  seed: \x01\n")
    text = sentence(str(path))
    assert text.startswith(f"{path}: is not valid YAML (") and "\n" not in text


def test_numbers_in_a_file_are_not_taken_for_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  output_dir: 2024\n")
    assert sentence(str(path)) == "train.output_dir=2024: must be text; put it in quotes"


def test_unknown_key_of_a_file_names_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("student:\n  patchsize: 14\n")
    assert sentence(str(path)) == (
        f"unknown key student.patchsize in {path}; the nearest known key is student.patch_size"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["crops.global_crops_size=220"],
            "crops.global_crops_size=220 is not a multiple of student.patch_size=16; use 208 or 224",
        ),
        (
            ["student.patch_size=14"],
            "crops.local_crops_size=96 is not a multiple of student.patch_size=14; use 84 or 98",
        ),
        (["crops.local_crops_size=9"], "crops.local_crops_size=9 is not a multiple of student.patch_size=16; use 16"),
        (
            ["evaluation.knn.image_size_px=100"],
            "evaluation.knn.image_size_px=100 is not a multiple of student.patch_size=16; use 96 or 112",
        ),
        (
            ["student.embed_dim=100", "student.num_heads=3"],
            "student.embed_dim=100 is not a multiple of student.num_heads=3 (student.arch=vit_large has 1024 and 16); "
            "set both",
        ),
        (
            ["student.arch=vit_tiny", "student.num_heads=5"],
            "student.embed_dim=192 is not a multiple of student.num_heads=5 (student.arch=vit_tiny has 192 and 3); "
            "set both",
        ),
        (
            ["student.arch=vit_tiny", "student.num_heads=24", "student.pos_embed_type=rope", "student.embed_dim=240"],
            "student.embed_dim=240 is not a multiple of 4 * student.num_heads=96, which student.pos_embed_type=rope "
            "needs; use 192 or 288",
        ),
        (
            ["student.pos_embed_rope_min_period=1"],
            "student.pos_embed_rope_base=100.0, pos_embed_rope_min_period=1.0 and pos_embed_rope_max_period=null: set "
            "the base alone, or both periods and base null",
        ),
        (
            ["student.pos_embed_rope_min_period=1", "student.pos_embed_rope_max_period=9"],
            "student.pos_embed_rope_base=100.0, pos_embed_rope_min_period=1.0 and pos_embed_rope_max_period=9.0: set "
            "the base alone, or both periods and base null",
        ),
        (
            ["student.pos_embed_rope_base=null"],
            "student.pos_embed_rope_base=null, pos_embed_rope_min_period=null and pos_embed_rope_max_period=null: set "
            "the base alone, or both periods and base null",
        ),
        (
            [
                "student.pos_embed_rope_base=null",
                "student.pos_embed_rope_min_period=9",
                "student.pos_embed_rope_max_period=1",
            ],
            "student.pos_embed_rope_min_period=9.0 is above student.pos_embed_rope_max_period=1.0",
        ),
        (
            ["student.arch=resnet50"],
            "student.arch=resnet50 has no patch tokens to mask; set ibot.loss_weight=0",
        ),
        (
            [
                "dino.reweight_dino_local_loss=true",
                "dino.local_loss_weight_schedule.warmup_epochs=90",
                "dino.local_loss_weight_schedule.cosine_epochs=11",
            ],
            "dino.local_loss_weight_schedule.warmup_epochs=90 and cosine_epochs=11 go beyond the end of the run at "
            "optim.epochs=100; shorten them",
        ),
        (
            ["train.compile=true", "train.compile_mode=reduce-overhead", "optim.gradient_accumulation_steps=4"],
            "train.compile_mode=reduce-overhead would overwrite the gradients of the passes before with "
            "optim.gradient_accumulation_steps=4; set train.compile_mode=default",
        ),
        (
            ["train.global_batch_size=30", "optim.gradient_accumulation_steps=4"],
            "train.global_batch_size=30 is not a multiple of 4 (ranks=1 x optim.gradient_accumulation_steps=4); "
            "use 28 or 32",
        ),
        (
            ["augmentation.mean=[0.5]", "augmentation.std=[0.5]"],
            "augmentation.mean=[0.5] has 1 values, but student.in_chans=3; give one per channel, or null",
        ),
        (
            ["dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0"],
            "dino.loss_weight, dino.koleo_loss_weight and ibot.loss_weight are all 0: nothing is learned; "
            "set one above 0",
        ),
        (
            ["checkpointing.period=100", "checkpointing.keep_every=250"],
            "checkpointing.keep_every=250 is not a multiple of checkpointing.period=100; use 200 or 300",
        ),
        (
            ["checkpointing.save_best=knn_top1_pct", "evaluation.eval_period_iterations=0"],
            "checkpointing.save_best=knn_top1_pct needs evaluations while training; set "
            "evaluation.eval_period_iterations, or checkpointing.save_best=null",
        ),
        (
            ["checkpointing.copy_to=outputs/a/../run", "train.output_dir=outputs/run"],
            "checkpointing.copy_to=outputs/a/../run is train.output_dir itself; name another folder, best on another "
            "disk",
        ),
        (
            ["evaluation.knn.train_dataset_path=Digits:split=TRAIN"],
            "evaluation.knn.train_dataset_path is set but evaluation.knn.val_dataset_path is not; set both or neither",
        ),
        (
            ["evaluation.knn.val_dataset_path=Digits:split=TEST"],
            "evaluation.knn.val_dataset_path is set but evaluation.knn.train_dataset_path is not; set both or neither",
        ),
    ],
)
def test_keys_that_do_not_fit_together(overrides, expected):
    assert sentence(None, overrides) == expected


def test_local_crops_need_not_fit_when_there_are_none():
    assert load_config(None, ["student.patch_size=14", "crops.local_crops_number=0"]).crops.local_crops_size == 96


def test_resnets_need_no_whole_patches():
    cfg = load_config(None, ["student.arch=resnet18", "ibot.loss_weight=0", "crops.local_crops_size=97"])
    assert cfg.student.is_resnet and cfg.crops.local_crops_size == 97


def test_a_weight_schedule_at_rest_need_not_fit():
    assert load_config(None, ["dino.local_loss_weight_schedule.warmup_epochs=101"]).optim.epochs == 100


def test_batch_size_per_rank():
    assert batch_size_per_rank(load_config(None, ["train.batch_size_per_gpu=3"]), world_size=7) == 3
    cfg = load_config(None, ["train.global_batch_size=96", "optim.gradient_accumulation_steps=2"])
    assert batch_size_per_rank(cfg, world_size=3) == 16
    with pytest.raises(ConfigError) as caught:
        batch_size_per_rank(cfg, world_size=5)
    assert str(caught.value) == (
        "train.global_batch_size=96 is not a multiple of 10 (ranks=5 x optim.gradient_accumulation_steps=2); "
        "use 90 or 100, or 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48 processes"
    )


def test_batch_size_per_rank_of_a_run_that_goes_on():
    cfg = load_config(None, ["train.batch_size_per_gpu=7"])
    assert [batch_size_per_rank(cfg, world_size=ranks, saved_global_batch=12) for ranks in (1, 3, 12)] == [12, 4, 1]
    given = load_config(None, ["train.global_batch_size=10"])
    assert batch_size_per_rank(given, world_size=5, saved_global_batch=12) == 2
    for overrides, ranks, expected in (
        (
            [],
            5,
            "no multiple of 5 (ranks=5 x optim.gradient_accumulation_steps=1); use 1, 2, 3, 4, 6 or 12 processes, or "
            "set train.global_batch_size to 10 or 15",
        ),
        (
            ["optim.gradient_accumulation_steps=5"],
            1,
            "no multiple of 5 (ranks=1 x optim.gradient_accumulation_steps=5); let optim.gradient_accumulation_steps "
            "divide 12, or set train.global_batch_size to 10 or 15",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            batch_size_per_rank(load_config(None, overrides), world_size=ranks, saved_global_batch=12)
        assert str(caught.value) == f"the run to go on with has a global batch of 12 images, {expected}"


def test_training_needs_a_dataset():
    with pytest.raises(ConfigError) as caught:
        require_train_dataset(load_config(None))
    assert str(caught.value) == (
        "train.dataset_path is empty; name the training images, e.g. train.dataset_path=ImageFolder:root=photos"
    )
    assert require_train_dataset(load_config(None, ["train.dataset_path=Digits"])) == "Digits"
