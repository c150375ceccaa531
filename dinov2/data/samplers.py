"""Order of the samples: a global stream of positions, its images, and the part of it that one rank reads.

Position p of the stream is an image that depends on the seed and p alone. Global batch s holds the
positions s * global_batch_size and following; of each, rank r reads a contiguous slice. So resuming is choosing a
first position, and N ranks read together what one would.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import numpy as np

from dinov2.data.datasets.mixed import MixedDataset
from dinov2.data.random_streams import derive_seed, mix64, shuffled
from dinov2.errors import ConfigError

_ORDER_STREAM = 2  # of derive_seed; 0 is the samples', 1 and 3 the masks', 4 the replacements'
_MEMBER_STREAM, _PART_STREAM, _TURN_STREAM = 5, 6, 7
_BLOCK = 10_000  # positions in which the parts of a mixture have their exact shares
_NUM_ROUNDS = 6  # of the Feistel network; 4 make a pseudo-random permutation in theory (Luby and Rackoff 1988)


class SamplerType(Enum):
    """How the stream goes through the dataset; names as in DINOv2."""

    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3


class SampleStream(ABC):
    """An endless stream of dataset indices with random access."""

    @abstractmethod
    def index_at(self, position: int) -> int:
        """Dataset index at a position of the stream, >= 0."""


class ShuffledStream(SampleStream):
    """Passes over the dataset, each in an order of its own, of which only the first `pass_size` are read.

    Cost: one permutation in memory, 8 bytes an image, made anew in each pass.
    """

    def __init__(self, dataset_size: int, seed: int, *, pass_size: int) -> None:
        self.pass_size = pass_size
        self.dataset_size = dataset_size
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def index_at(self, position: int) -> int:
        epoch, place = divmod(position, self.pass_size)
        if epoch != self._epoch:
            self._order = shuffled(self.dataset_size, derive_seed(self.seed, _ORDER_STREAM, epoch))
            self._epoch = epoch
        return int(self._order[place])


class PermutedStream(SampleStream):
    """Passes over the dataset, each in an order of its own that is computed place by place.

    A Feistel network permutes the numbers below the next power of four; places whose image is no index are walked on
    (Black and Rogaway 2002). Cost: no memory, four evaluations a sample at worst on average.
    """

    def __init__(self, dataset_size: int, seed: int) -> None:
        self.pass_size = dataset_size
        self.dataset_size = dataset_size
        self.seed = seed
        self._half_bits = max(1, ((dataset_size - 1).bit_length() + 1) // 2)

    def index_at(self, position: int) -> int:
        epoch, place = divmod(position, self.dataset_size)
        key = derive_seed(self.seed, _ORDER_STREAM, epoch)
        place = self._permute(place, key)
        while place >= self.dataset_size:
            place = self._permute(place, key)
        return place

    def _permute(self, value: int, key: int) -> int:
        """One-to-one map of the numbers below 4 ** half_bits."""
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for step in range(_NUM_ROUNDS):
            left, right = right, left ^ (mix64(key ^ (step << 60) ^ right) >> 17 & mask)
        return left << self._half_bits | right


class OnePerGroupStream(SampleStream):
    """Passes over the groups of a dataset, each with one image of every group.

    In as many passes as a group has images, each of them is drawn once, in an order of the group's own.
    Cost: 16 bytes an image.

    Args:
        groups: number of the group of each image, [images].
        over_groups: stream of group numbers 0, 1, ...
        seed: train.seed.
    """

    def __init__(self, groups: np.ndarray, over_groups: ShuffledStream | PermutedStream, *, seed: int) -> None:
        self.over_groups = over_groups
        self.seed = seed
        self.members = np.argsort(groups, kind="stable")  # images, group by group
        self.starts = np.cumsum([0, *np.unique(groups, return_counts=True)[1]])  # [groups + 1], into members

    def index_at(self, position: int) -> int:
        group = self.over_groups.index_at(position)
        start, end = int(self.starts[group]), int(self.starts[group + 1])
        turns = PermutedStream(end - start, derive_seed(self.seed, _MEMBER_STREAM, group))
        return int(self.members[start + turns.index_at(position // self.over_groups.pass_size)])


class MixedStream(SampleStream):
    """Samples of several streams in given shares.

    Of each `_BLOCK` positions a part has as many as its share is worth, at places drawn anew in each block, and goes
    through its own stream there.

    Args:
        streams: of the parts.
        starts: index of each part's first image.
        shares: of the parts, adding up to 1.
        seed: train.seed.

    Raises:
        ConfigError: a share is less than half a place in a block.
    """

    def __init__(
        self, streams: Sequence[SampleStream], *, starts: Sequence[int], shares: Sequence[float], seed: int
    ) -> None:
        self.streams = list(streams)
        self.starts = [int(start) for start in starts]
        self.seed = seed
        ends = np.round(np.cumsum(shares) * _BLOCK).astype(np.int64)
        self.counts = np.diff(ends, prepend=0)  # of a block
        if self.counts.min() < 1:
            smallest = int(np.argmin(shares))
            raise ConfigError(
                f"part {smallest + 1} of the mixture of datasets has a share of {shares[smallest]:g}, too small to be "
                f"drawn at all; give it at least {1 / _BLOCK:g}"
            )
        self._block = -1
        self._part = np.empty(0, dtype=np.int64)  # at each place of the present block
        self._turn = np.empty(0, dtype=np.int64)  # places of the same part before it in the block

    def index_at(self, position: int) -> int:
        block, place = divmod(position, _BLOCK)
        if block != self._block:
            self._draw(block)
        part = int(self._part[place])
        turn = block * int(self.counts[part]) + int(self._turn[place])
        return self.starts[part] + self.streams[part].index_at(turn)

    def _draw(self, block: int) -> None:
        """Draw which part stands where in a block."""
        parts = np.repeat(np.arange(len(self.counts)), self.counts)
        self._part = parts[shuffled(_BLOCK, derive_seed(self.seed, _TURN_STREAM, block))]
        self._turn = np.empty_like(self._part)
        for part, count in enumerate(self.counts):
            self._turn[self._part == part] = np.arange(count)
        self._block = block


def make_stream(dataset: Any, kind: SamplerType | str, *, seed: int, global_batch_size: int) -> SampleStream:
    """Build the stream of a dataset's samples: over its images, its groups, or its parts in their shares.

    Args:
        dataset: one with `pass_groups`, a `MixedDataset`, or any other with a length.
        kind: see `make_sampler`; in a mixture with weights, the parts' passes drop nothing.
        seed: train.seed.
        global_batch_size: images of one step over all ranks.

    Raises:
        ConfigError: a pass holds fewer samples than one global batch; one image per group is wanted without groups.
    """
    if isinstance(dataset, MixedDataset) and dataset.weights is not None:
        kind = SamplerType[kind.upper()] if isinstance(kind, str) else kind
        gapless = SamplerType.INFINITE if kind is SamplerType.EPOCH else kind
        streams = [
            make_stream(part, gapless, seed=derive_seed(seed, _PART_STREAM, number), global_batch_size=1)
            for number, part in enumerate(dataset.parts)
        ]
        _require_a_batch(pass_size(dataset), "images", global_batch_size)
        return MixedStream(streams, starts=dataset.starts[:-1].tolist(), shares=dataset.weights, seed=seed)
    groups = dataset.pass_groups() if hasattr(dataset, "pass_groups") else None
    if groups is None:
        return make_sampler(kind, dataset_size=len(dataset), seed=seed, global_batch_size=global_batch_size)
    count = len(np.unique(groups))
    _require_a_batch(count, "groups with one_per_group=true", global_batch_size)
    stream = make_sampler(kind, dataset_size=count, seed=seed, global_batch_size=global_batch_size)
    return OnePerGroupStream(groups, stream, seed=seed)


def pass_size(dataset: Any) -> int:
    """Samples of one pass over a dataset: its images, or its groups if a pass draws one image of each."""
    groups = dataset.pass_groups() if hasattr(dataset, "pass_groups") else None
    return len(dataset) if groups is None else len(np.unique(groups))


def make_sampler(
    kind: SamplerType | str,
    *,
    dataset_size: int,
    seed: int,
    global_batch_size: int,
) -> ShuffledStream | PermutedStream:
    """Build the stream of samples.

    Args:
        kind: EPOCH: each pass drops the images behind its last whole global batch, others in each pass. INFINITE:
            passes follow one another without a gap, so each visits each image once. SHARDED_INFINITE: the same
            without a permutation in memory.
        dataset_size: images.
        seed: train.seed.
        global_batch_size: images of one step over all ranks.

    Raises:
        ConfigError: the dataset holds fewer images than one global batch.
    """
    _require_a_batch(dataset_size, "images", global_batch_size)
    kind = SamplerType[kind.upper()] if isinstance(kind, str) else kind
    if kind is SamplerType.SHARDED_INFINITE:
        return PermutedStream(dataset_size, seed)
    dropped = dataset_size % global_batch_size if kind is SamplerType.EPOCH else 0
    return ShuffledStream(dataset_size, seed, pass_size=dataset_size - dropped)


def _require_a_batch(count: int, what: str, global_batch_size: int) -> None:
    if count < global_batch_size:
        raise ConfigError(
            f"the dataset holds {count} {what}, fewer than the {global_batch_size} of one global batch; "
            "lower train.batch_size_per_gpu or train.global_batch_size"
        )


class RankBatchSampler:
    """Batches of one rank: lists of (position in the stream, dataset index), without end.

    Args:
        stream: order of the samples.
        batch_size: images of one rank in one batch.
        start_position: samples of the stream that all ranks together have read before.
        rank: 0 .. world_size - 1.
        world_size: ranks.
    """

    def __init__(
        self,
        stream: SampleStream,
        *,
        batch_size: int,
        start_position: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.stride = batch_size * world_size
        self.first = start_position + rank * batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.first
        while True:
            yield [(position, self.stream.index_at(position)) for position in range(first, first + self.batch_size)]
            first += self.stride
