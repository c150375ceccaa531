"""The names that a library gives to the tensors of a backbone, as one table that is read in both directions.

A table maps each official name to its spellings elsewhere. A spelling is a tuple of names: one name for a renamed
tensor, several for a tensor that the other library keeps in equal parts along its first axis (queries, keys and
values). `None` in a spelling is a part that the library does not keep because it is zero.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from dinov2.errors import CheckpointError
from dinov2.hub.stored_tensor import State, StoredTensor

Spelling = tuple[str | None, ...]
Table = dict[str, tuple[Spelling, ...]]

_OFFICIAL_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_NUMBER_IN_BLOCKS = re.compile(r"^(?:\d+\.)?(\d+)\.(.+)$")  # "7.x", or "1.7.x" for block 7 in chunk 1


@dataclass(frozen=True)
class Place:
    """Where a tensor of another library belongs."""

    official: str  # whole name
    spelling: Spelling
    part: int  # position in the spelling

    @property
    def is_renamed(self) -> bool:
        """Say whether the official name is more than the same name, the number of the block apart."""
        match = _OFFICIAL_BLOCK.match(self.official)
        return self.spelling != (match[2] if match else self.official,)


@dataclass(frozen=True)
class Naming:
    """One library's names of one family of backbones.

    Attributes:
        title: for people.
        blocks: what may stand before the number of a block; the first is written.
        trunk: official name outside the blocks to its spellings; the first is written.
        block: the same inside a block, without `blocks.<number>.`.
    """

    title: str
    blocks: tuple[str, ...]
    trunk: Table
    block: Table

    @cached_property
    def _trunk_places(self) -> dict[str, tuple[str, Spelling, int]]:
        return _places(self.trunk)

    @cached_property
    def _block_places(self) -> dict[str, tuple[str, Spelling, int]]:
        return _places(self.block)

    def find(self, name: str) -> Place | None:
        """Return the place of a tensor of the library, None if the table does not know it."""
        if name in self._trunk_places:
            return Place(*self._trunk_places[name])
        inside = self._inside_block(name)
        if inside is None or inside[1] not in self._block_places:
            return None
        official, spelling, part = self._block_places[inside[1]]
        return Place(f"blocks.{inside[0]}.{official}", spelling, part)

    def stray(self, name: str) -> str | None:
        """Return a name for a tensor that stands inside a block without being known, None for all other tensors."""
        inside = self._inside_block(name)
        return None if inside is None else f"blocks.{inside[0]}.{inside[1]}"

    def _inside_block(self, name: str) -> tuple[str, str] | None:
        for prefix in self.blocks:
            match = _NUMBER_IN_BLOCKS.match(name.removeprefix(prefix)) if name.startswith(prefix) else None
            if match:
                return match[1], match[2]
        return None

    def write(self, state: State) -> State:
        """Give official tensors the library's names, in the order of `state`; parts are split off.

        Raises:
            CheckpointError: the library has no place for a tensor; a sentence without the file's name.
        """
        written: State = {}
        for official, tensor in state.items():
            prefix, rest, table = "", official, self.trunk
            if match := _OFFICIAL_BLOCK.match(official):
                prefix, rest, table = f"{self.blocks[0]}{match[1]}.", match[2], self.block
            if rest not in table:
                raise CheckpointError(f"{self.title} has no place for {official}")
            spelling = table[rest][0]
            for part, name in enumerate(spelling):
                if name is not None:
                    written[prefix + name] = slice_part(tensor, part, len(spelling))
        return written


def _places(table: Table) -> dict[str, tuple[str, Spelling, int]]:
    """Turn a table around; of two official names with one spelling the first is read."""
    places: dict[str, tuple[str, Spelling, int]] = {}
    for official, spellings in table.items():
        for spelling in spellings:
            for part, name in enumerate(spelling):
                if name is not None:
                    places.setdefault(name, (official, spelling, part))
    return places


def tensors(names: Mapping[str, str | Spelling | list[str | Spelling]]) -> Table:
    """Make a table of single tensors; a list gives several spellings."""
    return {official: tuple(map(_spelling, _as_list(spellings))) for official, spellings in names.items()}


def layers(names: Mapping[str, str | Spelling | list[str | Spelling]]) -> Table:
    """Make a table of layers: each name stands for a `.weight` and a `.bias`."""
    return {
        f"{official}.{kind}": tuple(
            tuple(f"{name}.{kind}" for name in _spelling(spelling)) for spelling in _as_list(spellings)
        )
        for official, spellings in names.items()
        for kind in ("weight", "bias")
    }


def same(names: Iterable[str]) -> dict[str, str]:
    """Name things as they are."""
    return {name: name for name in names}


def change(table: Table, changes: Table) -> Table:
    """Replace the spellings of some official names."""
    unknown = changes.keys() - table.keys()
    assert not unknown, f"no such official names: {unknown}"
    return table | changes


def _as_list(spellings: str | Spelling | list[str | Spelling]) -> list[str | Spelling]:
    return spellings if isinstance(spellings, list) else [spellings]


def _spelling(spelling: str | Spelling) -> Spelling:
    return (spelling,) if isinstance(spelling, str) else spelling


def slice_part(tensor: StoredTensor, part: int, num_parts: int) -> StoredTensor:
    """Take one of the equal parts along the first axis."""
    if num_parts == 1:
        return tensor
    rows = tensor.shape[0] // num_parts
    return tensor.map((rows, *tensor.shape[1:]), lambda whole: whole[part * rows : (part + 1) * rows])


def concatenate(parts: list[StoredTensor]) -> StoredTensor:
    """Put tensors one after another along the first axis."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return StoredTensor(torch.Size(shape), parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def constant(value: float, shape: Iterable[int], dtype: torch.dtype) -> StoredTensor:
    """Fill a tensor that a library leaves out because its values are known."""
    size = torch.Size(shape)
    return StoredTensor(size, dtype, lambda: torch.full(size, value, dtype=dtype))
