"""Config files that name another as their base."""

import pytest

from dinov2.configs import load_config
from dinov2.configs.files import write_as_one_file
from dinov2.errors import ConfigError

BASE = "optim: {base_lr: 1e-3, epochs: 7}\nstages:\n  - {name: heads, epochs: 2}\n  - {name: all, epochs: 5}\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.yaml").write_text(BASE)
    (tmp_path / "mine.yaml").write_text("base: recipes/base.yaml\noptim:\n  epochs: 9\ntrain.seed: 3\n")
    return tmp_path


def fails(path):
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    return str(error.value)


def test_a_file_changes_keys_of_its_base(folder):
    cfg = load_config(str(folder / "mine.yaml"), ["optim.warmup_epochs=0"])
    assert (cfg.optim.base_lr, cfg.optim.epochs, cfg.train.seed) == (1e-3, 9, 3)
    assert [stage.name for stage in cfg.stages] == ["heads", "all"]


def test_a_list_replaces_that_of_the_base(folder):
    (folder / "own.yaml").write_text("base: mine.yaml\nstages: [{name: one, epochs: 3}]\n")
    cfg = load_config(str(folder / "own.yaml"), ["optim.warmup_epochs=0"])
    assert [stage.name for stage in cfg.stages] == ["one"] and cfg.train.seed == 3


def test_one_file_says_what_several_say(folder):
    write_as_one_file(folder / "mine.yaml", folder / "elsewhere.yaml")
    assert "base:" not in (folder / "elsewhere.yaml").read_text()
    settings = ["optim.warmup_epochs=0"]
    assert load_config(str(folder / "elsewhere.yaml"), settings) == load_config(str(folder / "mine.yaml"), settings)
    write_as_one_file(folder / "recipes" / "base.yaml", folder / "copy.yaml")
    assert (folder / "copy.yaml").read_text() == BASE


def test_a_base_that_is_missing_wrong_or_the_file_itself_is_named(folder):
    path = folder / "bad.yaml"
    path.write_text("base: none.yaml\n")
    assert fails(path) == (
        f"{folder}/none.yaml: no such config file, which bad.yaml names as its base; copy it there or give its path"
    )
    path.write_text("base: [a, b]\n")
    assert fails(path) == (
        f"{path}: base=['a', 'b'] must be the path of another config file, e.g. adapt_small_data.yaml"
    )
    path.write_text("base: recipes/base.yaml\noptim: {base_rl: 1}\n")
    assert fails(path).startswith(f"unknown key optim.base_rl in {path}")
    path.write_text("base: mine.yaml\n")
    (folder / "mine.yaml").write_text("base: bad.yaml\n")
    assert fails(path) == f"{path}: is a base of itself; take out one `base:`"
