"""Names and shapes of all official backbones and heads, from the golden file."""

import gzip
import json
from types import SimpleNamespace

from support.golden import FOLDER


def official_shapes():
    """Return {backbone: {tensor: object with .shape}}."""
    with gzip.open(FOLDER / "state_dict_shapes.json.gz", "rt") as file:
        return {
            name: {key: SimpleNamespace(shape=tuple(shape)) for key, shape in state.items()}
            for name, state in json.load(file).items()
        }
