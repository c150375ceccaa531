"""Order of the samples: a global stream of positions, its images, and the part of it that one rank reads.

Position p of the stream is an image that depends on the seed and p alone. Global batch s holds the
positions s * global_batch_size and following; of each, rank r reads a contiguous slice. So resuming is choosing a
first position, and N ranks read together what one would.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import Enum

import numpy as np

from dinov2.data.random_streams import derive_seed, mix64, shuffled
from dinov2.errors import ConfigError

_ORDER_STREAM = 2  # of derive_seed; 0 is the samples', 1 the masks'
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


def make_sampler(
    kind: SamplerType | str,
    *,
    dataset_size: int,
    seed: int,
    global_batch_size: int,
) -> SampleStream:
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
    if dataset_size < global_batch_size:
        raise ConfigError(
            f"the dataset holds {dataset_size} images, fewer than the {global_batch_size} of one global batch; "
            "lower train.batch_size_per_gpu or train.global_batch_size"
        )
    kind = SamplerType[kind.upper()] if isinstance(kind, str) else kind
    if kind is SamplerType.SHARDED_INFINITE:
        return PermutedStream(dataset_size, seed)
    dropped = dataset_size % global_batch_size if kind is SamplerType.EPOCH else 0
    return ShuffledStream(dataset_size, seed, pass_size=dataset_size - dropped)


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
