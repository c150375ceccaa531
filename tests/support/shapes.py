"""Names and shapes of the official backbones and heads, from the golden file."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

_PATH = Path(__file__).parents[1] / "golden" / "state_dict_shapes.json.gz"


def official_shapes():
    """Return {backbone: {tensor: object with .shape}}."""
    return {
        name: {key: SimpleNamespace(shape=tuple(shape)) for key, shape in state.items()}
        for name, state in json.loads(gzip.decompress(_PATH.read_bytes())).items()
    }
