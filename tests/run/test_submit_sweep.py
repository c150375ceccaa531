"""Sweeps: all combinations, names of their folders, and wrong flags."""

import pytest

from dinov2.errors import ConfigError
from dinov2.run.submit_sweep import read_sweep


def test_two_flags_give_all_combinations():
    runs = read_sweep(["optim.base_lr=1e-4,5e-5", "student.drop_path_rate=0, 0.1"], given=["optim.epochs=3"])
    assert [run.name for run in runs] == [
        "optim.base_lr=1e-4,student.drop_path_rate=0",
        "optim.base_lr=1e-4,student.drop_path_rate=0.1",
        "optim.base_lr=5e-5,student.drop_path_rate=0",
        "optim.base_lr=5e-5,student.drop_path_rate=0.1",
    ]
    assert runs[1].overrides == ("optim.base_lr=1e-4", "student.drop_path_rate=0.1")


def test_a_comma_within_brackets_separates_nothing():
    runs = read_sweep(["crops.global_crops_scale=[0.3,1.0],[0.5,1.0]"], given=[])
    assert [run.overrides for run in runs] == [
        ("crops.global_crops_scale=[0.3,1.0]",),
        ("crops.global_crops_scale=[0.5,1.0]",),
    ]
    assert runs[0].name == "crops.global_crops_scale=_0.3,1.0_"


def test_folder_names_hold_nothing_that_a_shell_or_a_file_system_minds():
    (run,) = read_sweep(["train.dataset_path=ImageFolder:root=/data/my photos"], given=[])
    assert run.name == "train.dataset_path=ImageFolder_root=_data_my_photos"
    assert run.overrides == ("train.dataset_path=ImageFolder:root=/data/my photos",)


def test_without_flags_there_is_one_run():
    (run,) = read_sweep([], given=["a.b=1"])
    assert run.name == "" and run.overrides == ()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["optim.epochs"], "--sweep optim.epochs: must be a key and its values, e.g. --sweep optim.base_lr=1e-4,5e-5"),
        (["a.b=1,,2"], "--sweep a.b=1,,2: must be a key and its values, e.g. --sweep optim.base_lr=1e-4,5e-5"),
        (["a.b=1,2,1"], "--sweep a.b=1,2,1: names a value twice"),
        (["a.b=1", "a.b=2"], "--sweep a.b=2: a.b is swept already; list all its values in one flag"),
        (["train.seed=1,2"], "--sweep train.seed=1,2: train.seed is also given by itself; remove one of the two"),
        (["a.b=x/y,x:y"], "--sweep: two runs would share the folder a.b=x_y; sweep names instead of paths"),
    ],
)
def test_wrong_flags_are_a_sentence(flags, message):
    with pytest.raises(ConfigError) as error:
        read_sweep(flags, given=["train.seed=0"])
    assert str(error.value) == message
