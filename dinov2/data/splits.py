"""Splits without leaks: a group of images belongs to train, val or test by a hash of its key.

A group stays where it is when others come or go, and all its images stay together, on any machine.
"""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

from dinov2.errors import DatasetError

SPLITS = ("all", "train", "val", "test")


def in_split(keys: Iterable[bytes | str], split: str, *, val_fraction: float, test_fraction: float = 0.0) -> np.ndarray:
    """Tell which images are in a split.

    Args:
        keys: the group of each image (its path below the root, if every image stands alone); str in file-system
            encoding.
        split: one of `SPLITS`.
        val_fraction: share of the groups in val, about; 0..1.
        test_fraction: share of the groups in test, about; with `val_fraction` at most 1.

    Returns:
        [n] bool. The hash of a key is a number of 0..1: val lies below `val_fraction`, test in the next
        `test_fraction`, train above.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if split == "all":
        return np.ones(sum(1 for _ in keys), dtype=bool)
    places = np.fromiter((_place(key) for key in keys), dtype=np.float64)
    start, end = {
        "val": (0.0, val_fraction),
        "test": (val_fraction, val_fraction + test_fraction),
        "train": (val_fraction + test_fraction, 1.0),
    }[split]
    # the hash of a key may round to 1
    return (places >= start) & ((places < end) | (end >= 1))


def require_disjoint_groups(
    train: Iterable[str], val: Iterable[str], *, names: tuple[str, str] = ("train", "val"), kind: str = "group"
) -> None:
    """Check that no group has images in two splits.

    Args:
        train: group of each image of one split, in any order.
        val: the same of the other split.
        names: of the two splits, for the sentence.
        kind: what a group is, e.g. plate.

    Raises:
        DatasetError: names the first common group.
    """
    common = sorted(set(train) & set(val))
    if common:
        others = f" and {len(common) - 1} more" if len(common) > 1 else ""
        raise DatasetError(
            f"{kind} {common[0]!r}{others} has images both in {names[0]} and in {names[1]}, which lets one split give "
            f"the other's answers away; move each {kind} to one of them"
        )


def _place(key: bytes | str) -> float:
    """Hash of a key as a number of 0..1."""
    data = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") / 2**64
