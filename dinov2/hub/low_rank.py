"""Low-rank updates in files: of our own checkpoints they are merged into the weights, others are refused."""

import json
import re
from collections.abc import Iterable

from torch import Tensor

from dinov2.errors import CheckpointError
from dinov2.hub.stored_tensor import State, StoredTensor
from dinov2.layers.lora import UPDATE_NAMES, merge_update

_A, _B = UPDATE_NAMES
_OF_ANY_LIBRARY = re.compile(r"(^|\.)lora_[abAB](\.|$)")


def merge_low_rank_updates(state: State, *, config: str, where: str) -> State:
    """Give each weight with its update merged, when it is read; the updates themselves are left out.

    Args:
        state: tensors of a run; without updates it is returned as it is.
        config: of the run, JSON text; it tells how much the updates count.
        where: they stand, for error sentences.

    Raises:
        CheckpointError: the config does not tell.
    """
    updated = [name.removesuffix(f".{_A}") for name in state if name.endswith(f".{_A}")]
    if not updated:
        return state
    alpha = _alpha(config, where=where)
    own = {f"{layer}.{matrix}" for layer in updated for matrix in UPDATE_NAMES}
    merged = {name: tensor for name, tensor in state.items() if name not in own}
    for layer in updated:
        merged[f"{layer}.weight"] = _merged(*(state[f"{layer}.{name}"] for name in ("weight", _A, _B)), alpha=alpha)
    return merged


def refuse_unmerged_updates(names: Iterable[str], *, path: str) -> None:
    """Raise CheckpointError if there are low-rank updates, of any library, which loading would leave out."""
    name = next((name for name in names if _OF_ANY_LIBRARY.search(name)), None)
    if name is not None:
        raise CheckpointError(
            f"{path}: holds low-rank updates ({name}) beside the weights they belong to; merge them first, or give the "
            f"checkpoint of the run that trained them, or its teacher_checkpoint.pth"
        )


def _alpha(config: str, *, where: str) -> float:
    try:
        return float(json.loads(config)["lora"]["alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: holds low-rank updates, and no lora.alpha of the run that trained them; give a "
            f"teacher_checkpoint.pth of that run, which has none"
        ) from error


def _merged(weight: StoredTensor, lora_a: StoredTensor, lora_b: StoredTensor, *, alpha: float) -> StoredTensor:
    def read() -> Tensor:
        return merge_update(weight.read(), lora_a.read(), lora_b.read(), scale=alpha / lora_a.shape[0])

    return StoredTensor(weight.shape, weight.dtype, read)
