"""The package metadata names things that exist, and every direct dependency has a tested version."""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = distribution("dinov2-adapt")


def normalised(requirement):
    return re.split(r"[ ;<>=!~\[]", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize("entry", PACKAGE.entry_points, ids=lambda entry: f"{entry.group}:{entry.name}")
def test_commands_and_datasets_can_be_loaded(entry):
    assert callable(entry.load())


def test_every_dependency_that_make_installs_is_pinned():
    pins = {normalised(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    needed = {
        normalised(requirement)
        for requirement in PACKAGE.requires
        if "extra ==" not in requirement or re.search(r"extra == .(test|tensorboard).", requirement)
    }
    assert needed <= pins, needed - pins


def test_extras():
    named = {"test", "xformers", "tensorboard", "wandb", "onnx", "tiff", "mrc", "hdf5", "zarr"}
    assert named <= set(PACKAGE.metadata.get_all("Provides-Extra"))
