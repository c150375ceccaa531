"""A linear classifier on frozen features, as the evaluations save it: to predict classes of new images.

    head = load_linear_head("out/classifier_log_regression.safetensors")
    features = encoder.encode_features(images, head.pool)  # `dinov2.eval.encoder`, with the weights `head.weights`
    names = head.predict(features)

NAME.safetensors holds `weight` [C, D] and `bias` [C], float32; NAME.json all else.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dinov2.checkpoint_format import write_text
from dinov2.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class HeadDescription:
    """What the features must be, and what the classes are."""

    class_names: tuple[str, ...]  # C
    pool: str  # of the features, see `dinov2.eval.pooling`
    weights: str  # of the backbone, as the user named them
    checkpoint_key: str
    train_dataset: str


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Weights of a classifier; float32, on the CPU."""

    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    description: HeadDescription

    @property
    def pool(self) -> str:
        """Of the features that it takes."""
        return self.description.pool

    @property
    def weights(self) -> str:
        """Of the backbone whose features it takes."""
        return self.description.weights

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [n, C] of images with features [n, D].

        Raises:
            ValueError: the features are of another length.
        """
        if features.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"features of length {features.shape[-1]}, but the classifier takes {self.weight.shape[1]}: those of "
                f"the pool {self.pool} of {self.weights}"
            )
        return features.to(self.weight) @ self.weight.T + self.bias

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probabilities of the classes, [n, C]; each row sums to 1."""
        return self.logits(features).softmax(dim=-1)

    def predict(self, features: Tensor) -> list[str]:
        """Return the name of the likeliest class of each image."""
        return [self.description.class_names[number] for number in self.logits(features).argmax(dim=-1).tolist()]

    def save(self, path: Path) -> None:
        """Write `path`, a .safetensors file, and the JSON file beside it; each whole or not at all.

        Raises:
            CheckpointError: they cannot be written.
        """
        data = save({"weight": self.weight.float().contiguous(), "bias": self.bias.float().contiguous()})
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
            write_text(path.with_suffix(".json"), json.dumps(asdict(self.description), indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(f"{path}: the classifier cannot be written ({error.strerror})") from error


def load_linear_head(path: str | Path) -> LinearHead:
    """Read a classifier that an evaluation saved.

    Raises:
        CheckpointError: one of its two files is missing or damaged.
    """
    path = Path(path)
    try:
        tensors = load(path.read_bytes())
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        names = {field.name for field in fields(HeadDescription)}
        values = {name: tuple(about[name]) if name == "class_names" else about[name] for name in names}
        head = LinearHead(weight=tensors["weight"], bias=tensors["bias"], description=HeadDescription(**values))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: it or the .json file beside it is no saved classifier, or damaged") from error
    if head.weight.shape != (len(head.description.class_names), head.weight.shape[-1]):
        raise CheckpointError(f"{path}: weights of {len(head.weight)} classes, but the .json file names others")
    return head


def from_fit(weight: Tensor, bias: Tensor, description: HeadDescription) -> LinearHead:
    """Make a head of a fitted classifier in any float type."""
    return LinearHead(weight=weight.float().cpu(), bias=bias.float().cpu(), description=description)
