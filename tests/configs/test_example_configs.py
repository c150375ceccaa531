"""The YAML files in configs/ load, and each names keys of this project only."""

import shutil
from pathlib import Path

import pytest
import yaml

from dinov2.configs import load_config, to_dict

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))


def dotted(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")
        elif value is not None or prefix:  # a section of which all is commented out says nothing
            yield f"{prefix}{name}"


def keys_of(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content.pop("base", None)
    return list(dotted(content))


def by_name(path):
    return str(path.relative_to(FOLDER))


def test_there_are_example_configs():
    assert {"ssl_default_config.yaml", "train/adapt_small_data.yaml"} <= {by_name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_an_example_config_loads_without_a_note(path):
    assert load_config(str(path)).notes == ()


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_an_example_config_names_only_known_keys(path):
    assert set(keys_of(path)) <= set(dotted(to_dict(load_config(None))))


@pytest.mark.parametrize("name", ["adapt_small_data.yaml", "em.yaml"])
def test_commented_keys_of_an_example_config_load(tmp_path, name):
    text = (FOLDER / "train" / name).read_text(encoding="utf-8")
    head, _, commented = text.rpartition("  # knn:\n")
    shutil.copy(FOLDER / "train" / "adapt_small_data.yaml", tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(f"{head}  knn:\n{commented.replace('  # ', '  ')}", encoding="utf-8")
    assert load_config(str(path)).evaluation.knn.nb_knn == (10, 20)
