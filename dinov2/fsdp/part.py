"""The part of a run's state that one rank saves; who saves what is worked out once, for training waits for every save.

A rank saves its own rows of sharded tensors. What several ranks hold is saved by one of them, so that each has about
the same number of bytes to write.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.distributed import get_rank
from dinov2.fsdp.layout import Layout, layout_of
from dinov2.fsdp.wrap import reshard

Keys = tuple[str, ...]  # that lead to a tensor in the file


@dataclass(frozen=True)
class Part:
    """What this rank's file holds of a model and its optimisers."""

    tensors: dict[Keys, Tensor]  # local parts, which share their memory with the state
    layout: dict[str, dict[str, list[int]]]  # whole shape and offset of each of these, by its path in the file
    optimizers: dict[str, Any]  # their states, without tensors of `tensors`, with parameter names for indices


class PartToSave:
    """Finds the part that this rank saves; remembers the choice for as long as the state has the same tensors."""

    def __init__(self) -> None:
        """Look at nothing yet."""
        self._members: dict[str, Tensor] = {}  # all parameters and buffers
        self._saved_members: list[str] = []
        self._param_names: dict[int, str] = {}  # by identity of the parameter
        self._tensors: dict[Keys, Tensor] = {}  # all tensors of the state, as they were when the next two were found
        self._own: list[Keys] = []
        self._layout: dict[str, dict[str, list[int]]] = {}

    def forget(self) -> None:
        """Let go of tensors that are about to be replaced."""
        self.__init__()

    @torch.no_grad()
    def collect(self, model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> Part:
        """Return what this rank saves.

        Args:
            model: sharded or not.
            optimizers: of its parameters, by the name that they are saved under.
        """
        reshard(model)
        # Not its state_dict, which makes new tensors each time: it takes longer, and changes could not be seen.
        members = dict(model.named_parameters(remove_duplicate=False))
        members |= model.named_buffers(remove_duplicate=False)
        if not _are_same(members, self._members):
            self._members = members
            self._saved_members = list(model.state_dict())
            self._param_names = {id(param): name for name, param in model.named_parameters()}
        tensors: dict[Keys, Tensor] = {("model", name): members[name] for name in self._saved_members}
        states = {key: self._split(key, optimizer, tensors) for key, optimizer in optimizers.items()}
        if not _are_same(tensors, self._tensors):
            own = _share_of(get_rank(), tensors)
            self._tensors, self._own = tensors, list(own)
            self._layout = {
                "/".join(keys): {"global_shape": list(layout.global_shape), "offset": list(layout.offset)}
                for keys, layout in own.items()
            }
        # The parts anew each time: a parameter's can be put elsewhere in memory while the parameter stays the same.
        return Part({keys: _local(tensors[keys]) for keys in self._own}, self._layout, states)

    def _split(self, key: str, optimizer: torch.optim.Optimizer, tensors: dict[Keys, Tensor]) -> dict[str, Any]:
        """Add an optimiser's tensors to `tensors`, and return all else of its state."""
        state: dict[str, dict[str, Any]] = {}
        for param, values in optimizer.state.items():
            name = self._param_names[id(param)]
            state[name] = {}
            for item, value in values.items():
                if isinstance(value, Tensor):
                    tensors["checkpointables", key, "state", name, item] = value
                else:
                    state[name][item] = value
        groups = [
            group | {"params": [self._param_names[id(param)] for param in group["params"]]}
            for group in optimizer.param_groups
        ]
        return {"state": state, "param_groups": groups}


def _are_same(first: Mapping[Any, Tensor], second: Mapping[Any, Tensor]) -> bool:
    """Say whether both have the very same tensors under the same keys."""
    return first.keys() == second.keys() and all(second[key] is tensor for key, tensor in first.items())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _share_of(rank: int, tensors: Mapping[Keys, Tensor]) -> dict[Keys, Layout]:
    """Choose the tensors that a rank saves; all ranks that hold a part come to the same choice without asking."""
    layouts = {keys: layout_of(tensor) for keys, tensor in tensors.items()}
    saved_by = {keys: layout.holders[0] for keys, layout in layouts.items() if layout.num_replicas == 1}
    groups: dict[tuple[int, ...], list[Keys]] = {}
    for keys, layout in layouts.items():
        if layout.num_replicas > 1:
            groups.setdefault(layout.holders, []).append(keys)
    for holders, members in groups.items():
        saved_by |= _spread({keys: _local(tensors[keys]).nbytes for keys in members}, holders)
    return {
        keys: layout
        for keys, layout in layouts.items()
        if saved_by[keys] == rank and (_local(tensors[keys]).numel() or 0 in layout.global_shape)
    }


def _spread(sizes: Mapping[Keys, int], holders: Iterable[int]) -> dict[Keys, int]:
    """Give each tensor to one holder: the largest first, each to the holder with the fewest bytes so far."""
    loads = dict.fromkeys(holders, 0)
    chosen = {}
    for keys in sorted(sizes, key=lambda keys: (-sizes[keys], keys)):
        holder = min(loads, key=lambda rank: (loads[rank], rank))
        chosen[keys] = holder
        loads[holder] += sizes[keys]
    return chosen
