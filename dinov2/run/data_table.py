"""Tables on screen of what `check_data` found out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov2.run.data_report import count
from dinov2.run.stored_files import UNKNOWN

_MAX_CLASSES = 12  # that the screen lists
_MAX_PATHS = 3  # images of a kind that the screen lists


def format_set(found: Mapping[str, Any]) -> str:
    """Lay one set out, a fact a line."""
    return format_rows(
        {
            "dataset": found["dataset"],
            "images": _images(found),
            "unreadable": _unreadable(found),
            "sizes": _sizes(found["sizes"]),
            "channels": _counted(found["channels"], "channel", found),
            "bits a channel": _counted(found["bits"], "bit", found),
            "highest value": ", ".join(
                f"{value} of {2 ** int(bits) - 1}" for bits, value in found["highest_value"].items()
            ),
            "stored as": _stored(found["stored_as"]),
            "labels": _labels(found["labels"]),
            "groups": _groups(found["groups"]),
            "more than once": _duplicates(found["duplicates"]),
            "nearly constant": _listed(found["nearly_constant"]),
        }
    )


def format_comparison(found: Mapping[str, Any]) -> str:
    """Lay out what two sets share."""
    images = found["common_images"]
    constant = images["num_nearly_constant"]
    values = found["common_values"]
    return format_rows(
        {
            "in both": " and ".join(found["sets"]),
            "images": str(images["num_images"]) + (f", {constant} of them nearly constant" if constant else ""),
            **{
                name: f"{shared['in_both']} of {shared['in_first']} and {shared['in_second']}"
                for name, shared in values.items()
            },
        }
    )


def format_rows(rows: Mapping[str, str]) -> str:
    """Lay rows out in two columns, without those that say nothing, in characters that any terminal shows."""
    kept = {name: text for name, text in rows.items() if text}
    width = max(map(len, kept))
    return "\n".join(f"{name:<{width}}  {printable(text)}" for name, text in kept.items())


def format_augmentation(mean: Sequence[float], std: Sequence[float]) -> str:
    """Write mean and standard deviation as they go into a config file; a spread of 0 becomes 1."""
    means = ", ".join(_number(value) for value in mean)
    stds = ", ".join(_number(value or 1.0) for value in std)
    return f"augmentation: {{mean: [{means}], std: [{stds}]}}"


def printable(text: str) -> str:
    """Write characters that are none, of broken file names or terminal commands, as escapes."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _number(value: float) -> str:
    """Four digits, and never an exponent, which YAML reads as text."""
    return np.format_float_positional(value, precision=4, unique=False, fractional=False, trim="0")


def _images(found: Mapping[str, Any]) -> str:
    number, checked = found["num_images"], found["num_checked"]
    return str(number) if number == checked else f"{number}, of which {checked} were looked at"


def _unreadable(found: Mapping[str, Any]) -> str:
    number = found["num_unreadable"]
    reasons = [f"{item['path']}: {item['reason']}" for item in found["unreadable"][:_MAX_PATHS]]
    return f"{number}: {_shortened(reasons, number)}" if number else ""


def _sizes(sizes: Mapping[str, Any]) -> str:
    if not sizes["num_sizes"]:
        return ""
    frequent = [f"{size['width']} x {size['height']} px ({size['num_images']})" for size in sizes["most_frequent"]]
    if sizes["num_sizes"] <= len(frequent):
        return ", ".join(frequent)
    spans = [f"{name} {sizes[name]['min']}..{sizes[name]['max']} px" for name in ("width", "height")]
    return f"{sizes['num_sizes']}: {', '.join(spans)}; most often {', '.join(frequent[:_MAX_PATHS])}"


def _counted(numbers: Mapping[int, int], noun: str, found: Mapping[str, Any]) -> str:
    if len(numbers) == 1:
        return str(next(iter(numbers)))
    return ", ".join(f"{count(number, noun)} ({count(images, 'image')})" for number, images in numbers.items())


def _stored(kinds: Mapping[str, int]) -> str:
    return "" if list(kinds) == [UNKNOWN] else "; ".join(f"{kind} ({number})" for kind, number in kinds.items())


def _labels(labels: Mapping[str, Any] | None) -> str:
    if labels is None:
        return "none"
    images = labels["num_images"]
    rest = f"; {labels['num_unlabelled']} images without one" if labels["num_unlabelled"] else ""
    if len(images) <= _MAX_CLASSES:
        return ", ".join(f"{name} ({number})" for name, number in images.items()) + rest
    counts = list(images.values())
    return f"{labels['num_classes']} classes of {min(counts)}..{max(counts)} images{rest}"


def _groups(groups: Mapping[str, Any] | None) -> str:
    if groups is None:
        return ""
    span = f"{groups['min']}..{groups['max']}" if groups["min"] < groups["max"] else str(groups["min"])
    return f"{groups['num_groups']} of {span} images"


def _duplicates(duplicates: Mapping[str, Any]) -> str:
    groups = [" = ".join(group[:_MAX_PATHS]) for group in duplicates["groups"][:_MAX_PATHS]]
    return f"{duplicates['num_images']}: {_shortened(groups, len(duplicates['groups']))}" if groups else ""


def _listed(images: Mapping[str, Any]) -> str:
    number = images["num_images"]
    return f"{number}: {_shortened(images['paths'][:_MAX_PATHS], number)}" if number else ""


def _shortened(texts: Sequence[str], number: int) -> str:
    return ", ".join(texts) + (", ..." if number > len(texts) else "")
