"""A whole checkpoint, read by any number of processes: tensors put together from the rows that the rank files hold."""

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpoint_format.manifest import DamagedCheckpointError, Manifest, open_checkpoint
from dinov2.checkpoint_format.mapped_file import MappedFile, RankIndex, TensorEntry
from dinov2.checkpoint_format.names import rank_file_name


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in one rank's file."""

    rank: int
    first_row: int
    num_rows: int
    entry: TensorEntry


class StoredPieces:
    """A tensor of a checkpoint: shape and type are known, values are read and verified when asked for."""

    def __init__(
        self, checkpoint: "StoredCheckpoint", path: str, *, global_shape: tuple[int, ...], pieces: list[Piece]
    ) -> None:
        """Put pieces together.

        Raises:
            DamagedCheckpointError: they do not make the whole tensor.
        """
        self.path = path
        self.global_shape = global_shape
        self._checkpoint = checkpoint
        by_row = {piece.first_row: piece for piece in reversed(pieces) if piece.num_rows}  # replicas: the first rank's
        self.pieces = [by_row[first_row] for first_row in sorted(by_row)]
        self.dtype = pieces[0].entry.dtype
        if not self._are_whole(pieces):
            raise DamagedCheckpointError(
                f"{checkpoint.name}: the parts of {path} do not make the whole {list(global_shape)}"
            )

    @property
    def num_rows(self) -> int:
        """Length of the first axis; 1 for a tensor without axes."""
        return self.global_shape[0] if self.global_shape else 1

    def read(self, first_row: int, num_rows: int) -> Tensor:
        """Read rows, verified; a view of the file where one rank holds them all, not to be changed.

        Raises:
            DamagedCheckpointError: what the file holds is not what was written.
        """
        parts = [part for _, part in self.parts(first_row, num_rows)]
        if len(parts) == 1:
            return parts[0]
        empty = torch.empty((0, *self.global_shape[1:]), dtype=self.dtype)
        return torch.cat(parts) if parts else empty

    def read_all(self) -> Tensor:
        """Read the whole tensor, as `read`."""
        return self.read(0, self.num_rows)

    def parts(self, first_row: int, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the verified parts that rows consist of, each with its first row, counted from `first_row`."""
        end = first_row + num_rows
        begin = bisect.bisect_right(self.pieces, first_row, key=lambda piece: piece.first_row) - 1
        for piece in self.pieces[max(begin, 0) :]:
            start, stop = max(first_row, piece.first_row), min(end, piece.first_row + piece.num_rows)
            if start >= end:
                return
            if start < stop:
                file = self._checkpoint.file(piece.rank)
                rows = file.tensor(piece.entry, first_row=start - piece.first_row, num_rows=stop - start)
                yield start - first_row, rows

    def _are_whole(self, pieces: Iterable[Piece]) -> bool:
        """Say whether the pieces have one type and follow each other without gap or overlap up to the end."""
        row = 0
        for piece in self.pieces:
            if piece.first_row != row:
                return False
            row += piece.num_rows
        shapes = {piece.entry.shape[1:] for piece in pieces}
        return (
            row == self.num_rows
            and shapes == {self.global_shape[1:]}
            and {piece.entry.dtype for piece in pieces} == {self.dtype}
            and all(len(piece.entry.shape) == len(self.global_shape) for piece in pieces)
        )


class StoredCheckpoint:
    """A complete checkpoint; its files are mapped into memory one by one, when something of them is read.

    `model` maps names to tensors. `optimizer` is {"state": {parameter: {key: tensor or value}}, "param_groups": [...]}
    with parameters by name, empty where the run had none of that name.
    """

    def __init__(self, folder: Path, manifest: Manifest, indexes: Iterable[RankIndex]) -> None:
        """Put rank files together, as `read_rank_index` describes them; reads nothing.

        Raises:
            DamagedCheckpointError: they do not belong together, or a tensor is not whole.
        """
        self.folder = folder
        self.manifest = manifest
        self.name = manifest.name
        self._files: dict[int, MappedFile] = {}
        self._values = [index.values for index in sorted(indexes, key=lambda index: index.rank)]
        for rank, values in enumerate(self._values):
            self._check(rank, values)
        self.model: dict[str, StoredPieces] = self._tensors("model", [values["model"] for values in self._values])

    @classmethod
    def open(cls, folder: Path, name: str) -> "StoredCheckpoint":
        """Open a checkpoint: sizes and structure are verified now, tensors when they are read.

        Raises:
            DamagedCheckpointError: it is incomplete or damaged.
            CheckpointError: it has a format version that this program does not know.
        """
        manifest = open_checkpoint(folder, name)
        return cls(folder, manifest, [read_rank_index(folder, manifest, rank) for rank in range(manifest.world_size)])

    @property
    def config(self) -> str:
        """Resolved config of the run, JSON text."""
        return self._values[0].get("config", "")

    @property
    def extra(self) -> dict[str, Any]:
        """What was given to `save`: iteration, samples_seen and the like."""
        return self._read(0, self._values[0]["extra"])

    @property
    def optimizer(self) -> dict[str, Any]:
        """State of the optimiser that was saved as `optimizer`."""
        return self.optimizer_state("optimizer")

    @property
    def checkpointable_names(self) -> list[str]:
        """Name what was saved besides the model."""
        return list(self._values[0]["checkpointables"])

    def optimizer_state(self, key: str) -> dict[str, Any]:
        """Return the state of an optimiser with parameters by name, empty if there is none of this name."""
        saved = [values["checkpointables"].get(key, {}) for values in self._values]
        if not is_optimizer_state(saved[0]):
            return {}
        state: dict[str, dict[str, Any]] = {}
        for rank, part in enumerate(saved):
            for param, values in part["state"].items():
                plain = {key: item for key, item in values.items() if rank == 0 and not isinstance(item, TensorEntry)}
                state.setdefault(param, {}).update(plain)
        root = f"checkpointables/{key}/state"
        for param in state:
            holders = [part["state"].get(param, {}) for part in saved]
            state[param] |= self._tensors(f"{root}/{param}", holders)
        return {"state": state, "param_groups": saved[0]["param_groups"]}

    def rank_values(self, rank: int) -> dict[str, Any]:
        """Read what one rank saved of objects that are no optimisers (random numbers, scaler), by name."""
        saved = self._values[rank]["checkpointables"]
        return {key: self._read(rank, value) for key, value in saved.items() if not is_optimizer_state(value)}

    def file(self, rank: int) -> MappedFile:
        """Return one rank's file, mapped into memory."""
        if rank not in self._files:
            self._files[rank] = MappedFile(self.folder, self.manifest, rank)
        return self._files[rank]

    def release(self) -> None:
        """Let go of the mapped files, whose disk space is else kept after they are deleted; reading maps them again."""
        self._files.clear()

    def _tensors(self, root: str, holders: list[Mapping[str, Any]]) -> dict[str, StoredPieces]:
        """Put the tensors of all ranks together that stand under a path, in the order of the ranks."""
        pieces: dict[str, list[Piece]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for rank, holder in enumerate(holders):
            layout = self._values[rank]["layout"]
            for key, entry in holder.items():
                if isinstance(entry, TensorEntry):
                    shape, first_row = _place(layout, entry, version=self.manifest.format_version)
                    if shapes.setdefault(key, shape) != shape:
                        file = rank_file_name(self.name, rank)
                        raise DamagedCheckpointError(f"{file}: {entry.path} has another shape than in other files")
                    num_rows = entry.shape[0] if entry.shape else 1
                    pieces.setdefault(key, []).append(Piece(rank, first_row, num_rows, entry))
        return {
            key: StoredPieces(self, f"{root}/{key}", global_shape=shapes[key], pieces=found)
            for key, found in pieces.items()
        }

    def _check(self, rank: int, values: Mapping[str, Any]) -> None:
        """Require what every rank file has, and that it is this rank's of this checkpoint."""
        file = rank_file_name(self.name, rank)
        for key in ("model", "layout", "checkpointables", "extra"):
            if not isinstance(values.get(key), dict):
                raise DamagedCheckpointError(f"{file} has no {key}")
        found = (values.get("rank"), values.get("world_size"), values["extra"].get("iteration"))
        if found != (rank, self.manifest.world_size, self.manifest.iteration):
            raise DamagedCheckpointError(
                f"{file} is another checkpoint's: it holds rank {found[0]} of {found[1]} after iteration {found[2]}"
            )

    def _read(self, rank: int, value: Any) -> Any:
        """Copy nested data with its tensors read."""
        if isinstance(value, TensorEntry):
            return self.file(rank).tensor(value).clone()
        if isinstance(value, Mapping):
            return {key: self._read(rank, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._read(rank, item) for item in value)
        return value


def read_rank_index(folder: Path, manifest: Manifest, rank: int) -> RankIndex:
    """Find out what one rank file holds; its structure is verified, tensors are not read.

    Raises:
        DamagedCheckpointError: the file is damaged.
    """
    return MappedFile(folder, manifest, rank).read_index()


def is_optimizer_state(value: Any) -> bool:
    """Say whether the state of a checkpointable is that of an optimiser, with parameters by name."""
    return isinstance(value, Mapping) and value.keys() == {"state", "param_groups"}


def _place(layout: Mapping[str, Any], entry: TensorEntry, *, version: int) -> tuple[tuple[int, ...], int]:
    """Return the whole shape of a tensor and its first row; what the layout does not list is whole.

    Version 1 lists parameters alone, by name: optimiser state with a parameter's shape is split like it.
    """
    place = layout.get(entry.path)
    if version == 1:
        parts = entry.path.split("/")
        place = layout.get(parts[1] if parts[0] == "model" else parts[-2])
        if parts[0] != "model" and place is not None and len(place["global_shape"]) != len(entry.shape):
            place = None
    if place is None:
        return entry.shape, 0
    shape, offset = place["global_shape"], place["offset"]
    first_row = offset[0] if offset else 0
    if any(type(number) is not int or number < 0 for number in (*shape, *offset)) or any(offset[1:]):
        raise DamagedCheckpointError(f"{entry.path}: its place {shape} from {offset} is not one of rows")
    return tuple(shape), first_row
