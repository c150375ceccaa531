"""What a file of weights, a folder or a named model holds, before any tensor of it is read."""

from dataclasses import dataclass
from typing import Any

from dinov2.hub.stored_tensor import State


@dataclass(frozen=True)
class WeightsFile:
    """Names and shapes of the tensors, by the key under which a network stands."""

    path: str  # as the user gave it
    kind: str  # for people: "PyTorch file", "safetensors file", "training checkpoint (4 ranks)", "Hugging Face folder"
    states: dict[
        str, State
    ]  # {"": ...} where no key stands around; else {"teacher": ..., "student": ...}, {"model": ...}
    config: dict[str, Any] | None = None  # config.json of a Hugging Face folder or model
    extra_keys: tuple[str, ...] = ()  # what else stands beside the networks: optimizer, iteration, ...
