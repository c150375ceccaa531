"""Writing the resolved settings, their digest, and the generated reference file."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.config_reads import recording

from dinov2.configs import Config, config_digest, load_config, to_dict, write_config
from dinov2.configs.__main__ import main
from dinov2.configs.reference import field_comments
from dinov2.configs.tree import leaves, subsections
from dinov2.errors import ConfigError

REFERENCE = Path(__file__).resolve().parents[2] / "configs" / "ssl_default_config.yaml"


def all_sections(section):
    inner = list(subsections(section).values())
    return inner + [deeper for one in inner for deeper in all_sections(one)]


@pytest.mark.parametrize("text", ["on", "1e-3", "1_000", "null", "2024-01-31", "a: b", "# x", "'q'", "ü", " x ", "0x1"])
def test_what_is_written_reads_back_the_same(tmp_path, text):
    knn = {"train_dataset_path": text, "val_dataset_path": text, "nb_knn": (1, 2)}
    start = load_config(None, ["optim.min_lr=1.25e-7", "train.max_steps=3", "student.block_chunks=4"])
    evaluation = dataclasses.replace(start.evaluation, knn=dataclasses.replace(start.evaluation.knn, **knn))
    cfg = dataclasses.replace(start, evaluation=evaluation)
    path = tmp_path / "new" / "folder" / "config.yaml"
    write_config(cfg, path)
    again = load_config(str(path))
    assert again == cfg
    assert again.notes == ()
    assert config_digest(again) == config_digest(cfg)
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_the_file_holds_every_key_and_no_alias_of_one(tmp_path):
    write_config(load_config(None, ["train.saveckp_freq=2"]), tmp_path / "config.yaml")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == to_dict(load_config(None, ["checkpointing.period=2500"]))
    assert "notes" not in written and "saveckp_freq" not in written["train"]


def test_plain_yaml_reads_small_numbers_as_numbers(tmp_path):
    write_config(Config(), tmp_path / "config.yaml")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["optim"]["min_lr"] == 1e-6
    assert yaml.safe_load(REFERENCE.read_text())["student"]["layerscale"] == 1e-5


def test_digest_changes_with_any_setting_and_with_nothing_else():
    assert config_digest(Config()) == config_digest(load_config(None, ["train.cudagraphs=true"]))
    assert config_digest(Config()) != config_digest(load_config(None, ["evaluation.knn.batch_size=3"]))
    assert len(config_digest(Config())) == 64


def test_a_section_can_be_written_alone():
    assert to_dict(Config().crops)["global_crops_scale"] == [0.32, 1.0]
    assert "knn" in to_dict(Config().evaluation)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "config.yaml"
    with pytest.raises(ConfigError) as caught:
        write_config(Config(), path)
    assert str(caught.value) in {
        f"{path}: cannot be written (File exists)",
        f"{path}: cannot be written (Not a directory)",
    }


def test_reference_file_is_in_step_with_the_dataclasses(tmp_path):
    assert main(["--output", str(tmp_path / "made.yaml")]) == 0
    made = (tmp_path / "made.yaml").read_text(encoding="utf-8")
    assert made == REFERENCE.read_text(encoding="utf-8"), "run `make config-reference`"
    assert max(map(len, made.splitlines())) <= 120


def test_reference_file_loads_as_the_defaults():
    assert load_config(str(REFERENCE)) == Config()


def test_reference_program_prints_without_output():
    result = subprocess.run([sys.executable, "-m", "dinov2.configs"], capture_output=True, text=True, check=True)
    assert result.stdout == REFERENCE.read_text(encoding="utf-8")


def test_every_key_has_a_comment():
    for section in [Config, *all_sections(Config)]:
        comments = field_comments(section)
        for field in dataclasses.fields(section):
            assert comments[field.name] or field.name in subsections(section), f"{section.__name__}.{field.name}"


def test_sections_know_their_own_names():
    keys = {f"{section.KEY}.{field.name}" for section in all_sections(Config) for field in dataclasses.fields(section)}
    names = {section.KEY for section in all_sections(Config)}
    assert keys - names == leaves().keys() - {"defaults", "stages"}


def test_recording_tells_which_keys_are_read(tmp_path):
    cfg, read = recording(load_config(None, ["train.seed=5"]))
    write_config(cfg, tmp_path / "config.yaml")
    assert config_digest(cfg) and read == set()
    assert isinstance(cfg, Config) and cfg.train.seed == 5
    assert cfg.evaluation.knn.nb_knn and read == {"train.seed", "evaluation.knn.nb_knn"}
    copy = dataclasses.replace(cfg.data, cache_dir="cache")
    assert not any(key.startswith("data.") for key in read)
    assert copy.max_image_pixels and "data.max_image_pixels" in read
    assert load_config(str(tmp_path / "config.yaml")).train.seed == 5
