"""The k most similar training images of each query, and their votes.

Similarity is the cosine. Features are scaled to unit length and rounded to multiples of 2^-26, which keeps about as
much as float32 holds; their products then add up in float64 without any rounding. So neither the size of the blocks nor
the number of ranks shows in the result, and features that hardly differ are still told apart: in float32 the cosines of
a new network with LayerScale 1e-5 are all 1.

Equally similar images are ordered by place in the dataset: the earlier one is nearer. For that, similarity and place
are packed into one integer, whose order is the wanted one.

Q queries, T training images, D features, W ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2.distributed import all_gather_cat, all_gather_varlen, all_reduce_max, get_rank, get_world_size

_QUERIES_AT_ONCE = 1024  # over all ranks
_TRAIN_AT_ONCE = 8192  # the block of similarities then takes 64 MiB
_GRID = 2.0**26  # products are integers, and their sums at most 2^52
NOTHING = torch.iinfo(torch.int64).min  # below every neighbour


def find_neighbours(
    queries: Tensor, train: Tensor, *, train_indices: Tensor, num_neighbours: int, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Find the neighbours of this rank's queries among the training images of all ranks, block by block.

    All ranks call this together and run through to the end.

    Args:
        queries: features of this rank's queries, [Q, D]; as the next two it may be empty.
        train: features of this rank's training images, [T, D].
        train_indices: their places in the training set, [T], 0 .. 2**31 - 1.
        num_neighbours: k, at most the training images of all ranks.
        device: where the similarities are computed; takes about 0.5 GiB there.

    Yields:
        (rows of `queries`, similarities [q, k] float64, largest first, places in the training set [q, k] int64), the
        tensors on the CPU.
    """
    at_once = max(1, _QUERIES_AT_ONCE // get_world_size())
    packing = Packing.for_indices(train_indices)
    for start in range(0, int(all_reduce_max(torch.tensor([len(queries)]))), at_once):
        rows = slice(start, min(start + at_once, len(queries)))
        mine = queries[rows]
        keys = _nearest_here(
            all_gather_varlen(mine),
            train,
            train_indices=train_indices,
            num_neighbours=num_neighbours,
            device=device,
            packing=packing,
        )
        yield rows, *packing.unpack(_merge(keys, num_mine=len(mine), num_neighbours=num_neighbours))


def _nearest_here(
    queries: Tensor,
    train: Tensor,
    *,
    train_indices: Tensor,
    num_neighbours: int,
    device: torch.device,
    packing: "Packing",
) -> Tensor:
    """Return the packed nearest neighbours among this rank's training images, [Q, k], on the CPU."""
    best = torch.full((len(queries), num_neighbours), NOTHING, device=device)
    gridded_queries, query_norms = to_grid(queries.to(device))
    for start in range(0, len(train), _TRAIN_AT_ONCE):
        block = slice(start, start + _TRAIN_AT_ONCE)
        gridded, norms = to_grid(train[block].to(device))
        similarity = (gridded_queries @ gridded.T).div_(query_norms[:, None] * norms)  # [Q, t]
        keys = packing.pack(similarity, train_indices[block].to(device))
        keys = keys.topk(min(num_neighbours, keys.shape[1]), dim=1, sorted=False).values
        best = torch.cat([best, keys], dim=1).topk(num_neighbours, dim=1, sorted=False).values
    return best.cpu()


def _merge(keys: Tensor, *, num_mine: int, num_neighbours: int) -> Tensor:
    """From every rank's nearest of all queries [W * q, k], keep the nearest of this rank's queries [q, k], sorted."""
    lengths = all_gather_cat(torch.tensor([num_mine])).tolist()
    start = sum(lengths[: get_rank()])
    of_all_ranks = all_gather_cat(keys[None])[:, start : start + num_mine]  # [W, q, k]
    return of_all_ranks.transpose(0, 1).flatten(1).topk(num_neighbours, dim=1).values


def to_grid(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit features in multiples of the grid [n, D], float64 holding integers, and their lengths [n]."""
    gridded = (torch.nn.functional.normalize(features.double(), dim=1) * _GRID).round_()
    return gridded, gridded.square().sum(dim=1).sqrt_().clamp_(min=1)


@dataclass(frozen=True)
class Packing:
    """Integers of 63 bits: a similarity in the high ones, rounded to what fits, and a place, reversed, in the low."""

    index_bits: int

    @classmethod
    def for_indices(cls, indices: Tensor) -> "Packing":
        """Take as many bits for places as the largest place of all ranks needs."""
        largest = int(indices.max()) if len(indices) else 0
        return cls(int(all_reduce_max(torch.tensor([largest]))).bit_length())

    @property
    def _steps(self) -> float:
        """Steps of similarity between 0 and 1."""
        return 2.0 ** (61 - self.index_bits)

    @property
    def _index_mask(self) -> int:
        return (1 << self.index_bits) - 1

    def pack(self, similarity: Tensor, indices: Tensor) -> Tensor:
        """A larger integer is a nearer neighbour; `similarity` is changed in place."""
        levels = similarity.mul_(self._steps).round_().long()
        return (levels << self.index_bits) | (self._index_mask - indices)

    def unpack(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return similarities and places."""
        return (keys >> self.index_bits).double() / self._steps, self._index_mask - (keys & self._index_mask)


def vote(
    similarities: Tensor, classes: Tensor, *, ks: Sequence[int], temperature: float, num_classes: int
) -> Iterator[tuple[int, Tensor]]:
    """Let the neighbours vote for their classes, each with weight exp(similarity / temperature).

    Args:
        similarities: of the neighbours, [Q, K] float64, largest first.
        classes: of the neighbours, [Q, K], 0 .. num_classes - 1.
        ks: how many of the nearest vote, each <= K, in rising order.
        temperature: > 0.
        num_classes: C.

    Yields:
        (k, votes [Q, C] float64) for each k. The votes of all K sum to 1; the tensor is reused for the next k.

    Source: Wu et al. 2018, arXiv:1805.01978; the parents' `KnnModule`.
    """
    weights = torch.softmax(similarities / temperature, dim=1)
    votes = torch.zeros(len(classes), num_classes, dtype=torch.float64)
    counted = 0
    for k in ks:
        votes.scatter_add_(1, classes[:, counted:k], weights[:, counted:k])
        counted = k
        yield k, votes


def num_better_classes(votes: Tensor, targets: Tensor) -> Tensor:
    """Count the classes that are predicted before the right one: more votes, or equally many and a smaller number.

    Args:
        votes: [Q, C].
        targets: right class of each query, [Q]; -1 if it is none of the C.

    Returns:
        [Q] int64; C where the right class has no vote at all, because it is not predicted then.
    """
    own = votes.gather(1, targets.clamp(min=0)[:, None])  # [Q, 1]
    is_before = torch.arange(votes.shape[1]) < targets[:, None]
    better = ((votes > own) | ((votes == own) & is_before)).sum(dim=1)
    return torch.where((own[:, 0] > 0) & (targets >= 0), better, votes.shape[1])
