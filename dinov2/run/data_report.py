"""What `check_data` found out about a set of images, as plain data for JSON."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.data.datasets.extended import image_path
from dinov2.run.duplicates import find_repeats
from dinov2.run.image_facts import SetFacts

MAX_LISTED = 100  # images or groups of a kind that the report lists
_NUM_SIZES = 5


@dataclass(frozen=True)
class CheckedSet:
    """A set of images and what was found out about it."""

    name: str  # its dataset string
    dataset: Any
    facts: SetFacts
    keys: np.ndarray  # [images] uint64, equal for equal images, 0 for single ones

    def path(self, index: int) -> str:
        """Where an image comes from."""
        return image_path(self.dataset, index)

    @property
    def constant(self) -> np.ndarray:
        """[images] bool: looked at and nearly constant."""
        constant = np.zeros(len(self.dataset), dtype=bool)
        constant[self.facts.indices] = self.facts.is_nearly_constant
        return constant


def describe_set(checked: CheckedSet, *, crop_size: int) -> dict[str, Any]:
    """Put together what is known of a set.

    Args:
        checked: the set.
        crop_size: px; smaller images are counted.
    """
    facts = checked.facts
    readable = facts.is_readable
    is_small = readable & (np.minimum(facts.height, facts.width) < crop_size)
    repeated = find_repeats(checked.keys, max_groups=MAX_LISTED)
    bits, channels = (
        {number: sum(n for kind, n in facts.kinds.items() if kind[place] == number) for number in numbers}
        for place, numbers in ((1, sorted({kind[1] for kind in facts.kinds})), (0, sorted({k[0] for k in facts.kinds})))
    )
    mean, std = mean_and_std(facts)
    return {
        "dataset": checked.name,
        "num_images": len(checked.dataset),
        "num_checked": len(facts.indices),
        "num_unreadable": facts.num_unreadable,
        "unreadable": [{"path": path, "reason": reason} for path, reason in facts.reasons],
        "sizes": _describe_sizes(facts.width[readable], facts.height[readable]),
        "channels": channels,
        "bits": bits,
        "highest_value": facts.highest,
        "stored_as": dict(facts.stored.most_common()),
        "num_grey": facts.num_grey,
        "mean": mean,
        "std": std,
        "labels": _describe_labels(checked.dataset),
        "groups": _describe_groups(checked.dataset),
        "duplicates": {
            "num_images": repeated.num_surplus,
            "groups": [[checked.path(index) for index in group[:MAX_LISTED]] for group in repeated.groups],
        },
        "small": _listed(checked, is_small),
        "nearly_constant": _listed(checked, facts.is_nearly_constant),
    }


def mean_and_std(facts: SetFacts) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of the images with the most usual number of channels."""
    if not facts.brightness:
        return [], []
    return max(facts.brightness.values(), key=lambda brightness: brightness.count).mean_and_std()


def _listed(checked: CheckedSet, chosen: np.ndarray) -> dict[str, Any]:
    """Count images and list the first; `chosen` is a mask over those that were looked at."""
    rows = np.flatnonzero(chosen)
    first = [checked.path(int(checked.facts.indices[row])) for row in rows[:MAX_LISTED]]
    return {"num_images": len(rows), "paths": first}


def _describe_sizes(width: np.ndarray, height: np.ndarray) -> dict[str, Any]:
    """Sizes in px: how many there are, the most frequent, and the range."""
    if not len(width):
        return {"num_sizes": 0, "most_frequent": []}
    sizes, counts = np.unique(np.stack([width, height], axis=1), axis=0, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:_NUM_SIZES]
    span = {
        name: {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
        for name, values in (("width", width), ("height", height))
    }
    frequent = [
        {"width": int(sizes[row, 0]), "height": int(sizes[row, 1]), "num_images": int(counts[row])} for row in most
    ]
    return {"num_sizes": len(sizes), "most_frequent": frequent} | span


def _describe_labels(dataset: Any) -> dict[str, Any] | None:
    """Images of each class, by name; None without labels."""
    targets = dataset.get_targets() if hasattr(dataset, "get_targets") else None
    if targets is None:
        return None
    targets = np.asarray(targets)
    numbers, counts = np.unique(targets[targets >= 0], return_counts=True)
    names = list(getattr(dataset, "class_names", []))
    by_class = {names[number] if number < len(names) else str(number): 0 for number in range(len(names))}
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        by_class[str(names[number]) if number < len(names) else str(number)] = count
    return {"num_classes": len(by_class), "num_unlabelled": int((targets < 0).sum()), "num_images": by_class}


def _describe_groups(dataset: Any) -> dict[str, Any] | None:
    """Number and sizes of the groups; None if the dataset knows none."""
    groups = dataset.groups() if hasattr(dataset, "groups") else None
    if groups is None or not len(groups):
        return None
    counts = np.unique(groups, return_counts=True)[1]
    sizes, repeats = np.unique(counts, return_counts=True)
    return {
        "num_groups": len(counts),
        "min": int(counts.min()),
        "median": float(np.median(counts)),
        "max": int(counts.max()),
        "num_groups_by_size": {int(size): int(number) for size, number in zip(sizes, repeats, strict=True)},
    }


def count(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
