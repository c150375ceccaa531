"""Exact ranking of a gallery by similarity to each query, where some pairs may not be compared.

Similarities and ties are those of `dinov2.eval.neighbours`: cosines free of rounding, and of equally similar members of
the gallery the earlier is nearer. So neither blocks nor the number of ranks show. Every rank holds all queries and the
whole gallery, and ranks every W-th block of queries.

Shapes: Q queries, G gallery, E columns that exclude, q queries of one block, W ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import all_gather_varlen, get_rank, get_world_size
from dinov2.eval.neighbours import NOTHING, Packing, to_grid

_PAIRS_AT_ONCE = 1 << 24  # that one block of queries keeps: 128 MiB, several times over
_QUERIES_AT_ONCE = (16, 1024)
_GALLERY_AT_ONCE = 8192


@dataclass(frozen=True)
class Excluded:
    """Pairs that are not compared: those with equal numbers in any column, as of one compound, or of one batch."""

    queries: Tensor  # [Q, E] int64
    gallery: Tensor  # [G, E] int64

    @classmethod
    def within(cls, columns: Tensor) -> "Excluded":
        """Exclude pairs of one set by some columns [n, E], and each member from its own neighbours."""
        itself = torch.arange(len(columns))[:, None]
        columns = torch.cat([itself, columns], dim=1)
        return cls(columns, columns)

    def mask(self, rows: slice, block: slice, *, device: torch.device) -> Tensor:
        """Tell which members of a part of the gallery are not compared with some queries, [q, g] bool."""
        queries, gallery = self.queries[rows].to(device), self.gallery[block].to(device)
        mask = torch.zeros(len(queries), len(gallery), dtype=torch.bool, device=device)
        for column in range(queries.shape[1]):
            mask |= queries[:, column, None] == gallery[:, column]
        return mask


def rank_all(
    queries: Tensor, gallery: Tensor, *, excluded: Excluded, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rank the gallery for this rank's share of the queries, block by block.

    Args:
        queries: features [Q, D], finite, any float type.
        gallery: features [G, D].
        excluded: pairs that are not compared.
        device: where the ranking is computed, and where the results are.

    Yields:
        (rows of `queries`, similarities [q, G] float64, largest first, places in the gallery [q, G] int64); members
        that are excluded stand last, with similarity -inf and place 0.
    """
    for rows, keys, packing in _blocks(queries, gallery, excluded=excluded, device=device, num_kept=len(gallery)):
        yield rows, *_unpack(_sorted(keys), packing)


def find_nearest(
    queries: Tensor, gallery: Tensor, *, excluded: Excluded, k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Find the k nearest members of the gallery that each query may be compared with; called by all ranks.

    Returns:
        (similarities [Q, k] float64, largest first, places in the gallery [Q, k] int64), on the CPU, of all queries on
        every rank. Where there are fewer than k, similarity -inf and place -1.
    """
    found = []
    for rows, keys, packing in _blocks(queries, gallery, excluded=excluded, device=device, num_kept=k):
        similarities, places = _unpack(keys.topk(k, dim=1).values, packing)
        found.append((rows, similarities, places.masked_fill_(similarities == -torch.inf, -1)))
    nothing = (torch.empty(0, k, dtype=torch.float64), torch.empty(0, k, dtype=torch.int64))
    similarities, places = gather_by_query(found, nothing=nothing)
    return similarities, places


def gather_by_query(found: Sequence[tuple[slice, *tuple[Tensor, ...]]], *, nothing: Sequence[Tensor]) -> list[Tensor]:
    """Bring what the ranks found of their queries into the order of the queries, on every rank.

    Args:
        found: (rows, tensors with one line a query) of each block of this rank.
        nothing: tensors like these without a line, for a rank without queries.

    Returns:
        Tensors [Q, ...] on the CPU.
    """
    rows = torch.cat(
        [torch.empty(0, dtype=torch.int64), *(torch.arange(part[0].start, part[0].stop) for part in found)]
    )
    order = all_gather_varlen(rows).argsort()
    return [
        all_gather_varlen(torch.cat([empty, *(part[number].cpu() for part in found)]))[order]
        for number, empty in enumerate(nothing, start=1)
    ]


def _blocks(
    queries: Tensor, gallery: Tensor, *, excluded: Excluded, device: torch.device, num_kept: int
) -> Iterator[tuple[slice, Tensor, Packing]]:
    """Yield (rows, packed neighbours [q, >= num_kept], packing) of this rank's blocks of queries."""
    packing = Packing(max(1, len(gallery) - 1).bit_length())
    fewest, most = _QUERIES_AT_ONCE
    at_once = min(most, max(fewest, _PAIRS_AT_ONCE // max(num_kept, _GALLERY_AT_ONCE)))
    for start in range(get_rank() * at_once, len(queries), get_world_size() * at_once):
        rows = slice(start, min(start + at_once, len(queries)))
        gridded, norms = to_grid(queries[rows].to(device))
        keys = torch.empty(len(gridded), 0, dtype=torch.int64, device=device)
        for first in range(0, len(gallery), _GALLERY_AT_ONCE):
            block = slice(first, min(first + _GALLERY_AT_ONCE, len(gallery)))
            members, lengths = to_grid(gallery[block].to(device))
            similarity = (gridded @ members.T).div_(norms[:, None] * lengths)
            packed = packing.pack(similarity, torch.arange(block.start, block.stop, device=device))
            packed.masked_fill_(excluded.mask(rows, block, device=device), NOTHING)
            keys = torch.cat([keys, packed], dim=1)
            if keys.shape[1] > num_kept:
                keys = keys.topk(num_kept, dim=1, sorted=False).values
        yield rows, keys, packing


def _sorted(keys: Tensor) -> Tensor:
    """Sort each row, largest first. On the CPU NumPy takes a quarter of torch's time, which also finds the places."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1, descending=True).values
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)).flip(1)


def _unpack(keys: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Return similarities and places; -inf and 0 for members that are excluded."""
    similarities, places = packing.unpack(keys)
    is_excluded = keys == NOTHING
    return similarities.masked_fill_(is_excluded, -torch.inf), places.masked_fill_(is_excluded, 0)
