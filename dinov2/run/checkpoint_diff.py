"""Compare two checkpoints, or any two files of weights: tensors by value, settings, optimisers."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2.checkpoint_format import (
    StoredCheckpoint,
    StoredPieces,
    find_checkpoints,
    has_manifest,
    is_checkpoint_path,
    split_path,
)
from dinov2.checkpoint_format.rank_file import leaves
from dinov2.configs.changes import changed_settings
from dinov2.errors import CheckpointError
from dinov2.hub.open_checkpoint import stored_tensor
from dinov2.hub.open_weights import open_weights
from dinov2.hub.stored_tensor import State, StoredTensor
from dinov2.hub.weights_file import WeightsFile
from dinov2.logging.progress import track
from dinov2.run.checkpoint_files import format_columns, format_plural, open_stored, read_settings

_SHOWN_CHARACTERS = 60  # of a value
_CHUNK_VALUES = 1 << 20  # compared at once, in float64


class CannotCompare(CheckpointError):
    """One of the two cannot be read; as in diff(1), that is another exit code than a difference."""

    exit_code = 2


@dataclass(frozen=True)
class Side:
    """What is compared of a checkpoint. A file of weights has tensors alone."""

    tensors: State
    values: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Difference:
    """One thing that differs."""

    name: str
    how: str
    max_abs: float | None = None  # of tensors of equal shape


def open_sides(first: str, second: str) -> tuple[Side, Side]:
    """Open two checkpoints of runs, their folders, or any weights that training can start from.

    What each rank has of its own (random numbers) is compared for the ranks that both have.

    Raises:
        CannotCompare: there is nothing that can be read.
    """
    try:
        opened = [open_stored(path) if _is_of_run(path) else open_weights(path) for path in (first, second)]
        worlds = [one.manifest.world_size for one in opened if isinstance(one, StoredCheckpoint)]
        sides = [
            _side_of_run(one, num_ranks=min(worlds)) if isinstance(one, StoredCheckpoint) else _side_of_weights(one)
            for one in opened
        ]
    except CheckpointError as error:
        raise CannotCompare(str(error)) from error
    return sides[0], sides[1]


def _is_of_run(path: str) -> bool:
    place = Path(path).expanduser()
    if place.is_dir():
        return bool(find_checkpoints(place))
    return is_checkpoint_path(place) and has_manifest(*split_path(place))


def compare(first: Side, second: Side) -> Iterator[Difference]:
    """Yield what differs, values before tensors.

    Raises:
        CannotCompare: a tensor cannot be read.
    """
    if first.values is not None and second.values is not None:
        changes = changed_settings(first.settings or {}, second.settings or {})
        yield from (Difference("config", change) for change in changes)
        yield from _differing_values(first.values, second.values)
    tensors = (first.tensors, second.tensors)
    for name in track(list(dict.fromkeys((*tensors[0], *tensors[1]))), description="comparing"):
        if name not in tensors[0] or name not in tensors[1]:
            yield Difference(name, "only in the first" if name in tensors[0] else "only in the second")
        elif difference := _compare_tensors(name, tensors[0][name], tensors[1][name]):
            yield difference


def format_differences(differences: list[Difference], *, num_tensors: int, as_json: bool) -> str:
    """Lay differences out as a table with a summary, or as a JSON list."""
    if as_json:
        return json.dumps([vars(difference) for difference in differences], indent=2)
    changed = [difference.max_abs for difference in differences if difference.max_abs is not None]
    largest = f", largest difference {max(changed):.6g}" if changed else ""
    summary = f"{format_plural(num_tensors, 'tensor')} compared, {len(changed)} with other values{largest}; "
    summary += f"{len(differences) - len(changed)} other differences" if differences else "equal"
    rows = [[difference.name, difference.how] for difference in differences]
    return "\n".join([*([format_columns(rows)] if rows else []), summary])


def _side_of_run(stored: StoredCheckpoint, *, num_ranks: int) -> Side:
    tensors = {name: stored_tensor(stored, pieces) for name, pieces in stored.model.items()}
    values: dict[str, Any] = {}
    for key in stored.checkpointable_names:
        state = stored.optimizer_state(key)
        for number, group in enumerate(state.get("param_groups", [])):
            values |= {f"{key} group {number} {name}": value for name, value in group.items()}
        for param, items in state.get("state", {}).items():
            for item, value in items.items():
                if isinstance(value, StoredPieces):
                    tensors[f"{key} {item} of {param}"] = stored_tensor(stored, value)
                else:
                    values[f"{key} {item} of {param}"] = value
    per_rank = {f"rank {rank}": stored.rank_values(rank) for rank in range(num_ranks)}
    for path, value in leaves(per_rank | {"extra": stored.extra}):
        if isinstance(value, Tensor):
            tensors[path.replace("/", " ")] = StoredTensor.of(value)
        else:
            values[path.replace("/", " ")] = value
    return Side(tensors, values, read_settings(stored.config))


def _side_of_weights(weights: WeightsFile) -> Side:
    return Side(
        {f"{key}.{name}" if key else name: t for key, state in weights.states.items() for name, t in state.items()}
    )


def _differing_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys((*first, *second)):
        if key not in first or key not in second:
            yield Difference(key, "only in the first" if key in first else "only in the second")
        elif repr(first[key]) != repr(second[key]):  # in which NaN is itself
            yield Difference(key, f"{_shown(first[key])} -> {_shown(second[key])}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _compare_tensors(name: str, first: StoredTensor, second: StoredTensor) -> Difference | None:
    kinds = [f"{list(side.shape)} {str(side.dtype).removeprefix('torch.')}" for side in (first, second)]
    if kinds[0] != kinds[1]:
        return Difference(name, f"{kinds[0]} -> {kinds[1]}")
    try:
        tensors = first.read(), second.read()
    except CheckpointError as error:
        raise CannotCompare(str(error)) from error
    largest, num_different = _differing_numbers(*tensors)
    if not num_different:
        return None
    how = f"{num_different} of {first.numel()} values differ, by at most {largest:.6g}"
    return Difference(name, how, largest)


def _differing_numbers(first: Tensor, second: Tensor) -> tuple[float, int]:
    """Return the largest absolute difference, and how many values differ; NaN equals NaN, and nothing else."""
    largest, num_different = 0.0, 0
    chunks = (tensor.reshape(-1).split(_CHUNK_VALUES) for tensor in (first, second))
    for before, now in zip(*chunks, strict=True):
        differ = (before != now) & ~((before != before) & (now != now))
        if count := int(differ.sum()):
            num_different += count
            gaps = (before[differ].double() - now[differ].double()).abs()
            largest = math.inf if bool(gaps.isnan().any()) else max(largest, float(gaps.max()))
    return largest, num_different
