"""What is wrong with sets of images, and what they share though they should not: sentences for `check_data`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from dinov2.configs import Config
from dinov2.data.splits import require_disjoint_groups
from dinov2.errors import DatasetError
from dinov2.run.data_report import MAX_LISTED, CheckedSet, count
from dinov2.run.duplicates import find_common
from dinov2.run.image_facts import SetFacts
from dinov2.run.stored_files import stored_bits

_DESCRIBES_ONE_IMAGE = ("path", "target", "concentration", "control", "split", "site", "replicate")


@dataclass
class Findings:
    """Sentences about what would make training fail, and about what one probably wants to know."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def judge_set(checked: CheckedSet, found: dict[str, Any], cfg: Config) -> Findings:
    """Tell what is wrong with one set."""
    findings = Findings()
    _judge_readability(checked, findings, skips=cfg.train.on_bad_image == "skip")
    _judge_kinds(checked, findings, in_chans=cfg.student.in_chans)
    _judge_areas(checked, findings, cfg)
    warn = findings.warnings.append
    name, duplicates = checked.name, found["duplicates"]
    if duplicates["num_images"]:
        pair = " and ".join(duplicates["groups"][0][:2])
        warn(f"{name} holds {count(duplicates['num_images'], 'image')} more than once, the first {pair}")
    small, constant = found["small"]["num_images"], found["nearly_constant"]
    if small:
        size = cfg.crops.global_crops_size
        shown = count(small, "image")
        warn(f"{name} holds {shown} smaller than crops.global_crops_size={size} px; crops of them are enlarged")
    if constant["num_images"]:
        shown = count(constant["num_images"], "nearly constant image")
        warn(f"{name} holds {shown}, from which nothing is learnt; the first is {constant['paths'][0]}")
    return findings


def _judge_readability(checked: CheckedSet, findings: Findings, *, skips: bool) -> None:
    facts, name = checked.facts, checked.name
    if not facts.num_unreadable:
        return
    path, reason = facts.reasons[0]
    first = f"the first is {path}: {reason}"
    if facts.num_unreadable == len(facts.indices):
        findings.problems.append(f"{name}: none of {count(facts.num_unreadable, 'image')} can be read; {first}")
    elif skips:
        findings.warnings.append(
            f"{name}: {count(facts.num_unreadable, 'image')} cannot be read and will be skipped; {first}"
        )
    else:
        findings.problems.append(
            f"{name}: {count(facts.num_unreadable, 'image')} cannot be read; {first}; repair or remove what is "
            "broken, or set train.on_bad_image=skip"
        )


def _judge_kinds(checked: CheckedSet, findings: Findings, *, in_chans: int) -> None:
    """Look at channels and bits, which the images of one batch must share."""
    facts, name = checked.facts, checked.name
    channels, bits = ({kind[place] for kind in facts.kinds} for place in (0, 1))
    if len(channels) > 1:
        findings.problems.append(
            f"{name}: its images have {_counted(facts, 0, 'channels')}, but a batch needs images of one kind; "
            "train on each kind by itself"
        )
    elif channels and channels != {in_chans}:
        (number,) = channels
        findings.problems.append(
            f"{name}: its images have {count(number, 'channel')}, but student.in_chans={in_chans}; "
            f"set student.in_chans={number}"
        )
    if len(bits) > 1:
        findings.problems.append(
            f"{name}: its images have {_counted(facts, 1, 'bits')} a channel, but a batch needs images of one kind; "
            "store all alike, or set bits=8 or bits=16 in the dataset string where the dataset takes it"
        )
    deep = sum(number for stored, number in facts.stored.items() if stored_bits(stored) > 8)
    if deep and bits == {8}:
        findings.warnings.append(
            f"{name} holds {count(deep, 'file')} of more than 8 bits a channel, of which 8 are read; bits=16 in the "
            "dataset string keeps more where the dataset takes it"
        )
    readable = int(facts.is_readable.sum())
    if facts.num_grey and facts.num_grey == readable and in_chans > 1:
        findings.warnings.append(
            f"all images of {name} are grey in {in_chans} equal channels; student.in_chans=1 says the same with less"
        )


def _judge_areas(checked: CheckedSet, findings: Findings, cfg: Config) -> None:
    """Look for images that are read in parts, and are too large for the parts that training asks for."""
    facts, limit, share = checked.facts, cfg.data.max_image_pixels, cfg.crops.global_crops_scale[1]
    areas = facts.height.astype(np.int64) * facts.width
    places = np.flatnonzero(areas * share > limit) if limit is not None else np.empty(0, dtype=np.int64)
    if len(places):
        first = checked.path(int(facts.indices[places[0]]))
        findings.problems.append(
            f"{checked.name}: {count(len(places), 'image')} may need global crops of more than "
            f"data.max_image_pixels={limit}; the first is {first}; take tiles where the dataset has tile_px=, lower "
            f"crops.global_crops_scale, or raise the limit"
        )


def _counted(facts: SetFacts, place: int, noun: str) -> str:
    """Numbers of channels or bits with how many images have them: `8 bits (30 images) and 16 bits (2)`."""
    numbers = sorted({kind[place] for kind in facts.kinds})
    texts = []
    for number in numbers:
        images = sum(n for kind, n in facts.kinds.items() if kind[place] == number)
        texts.append(f"{count(number, noun.removesuffix('s'))} ({count(images, 'image')})")
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def compare_sets(sets: Sequence[CheckedSet]) -> tuple[list[dict[str, Any]], Findings]:
    """Look for what sets that should have nothing in common share: images, groups, other columns."""
    found, findings = [], Findings()
    for one, other in combinations(sets, 2):
        rows, partners = find_common(one.keys, other.keys)
        is_constant = one.constant[rows]
        pairs = [(one.path(int(row)), other.path(int(to))) for row, to in zip(rows, partners, strict=True)][:MAX_LISTED]
        found.append(
            {
                "sets": [one.name, other.name],
                "common_images": {"num_images": len(rows), "num_nearly_constant": int(is_constant.sum())},
                "pairs": pairs,
                "common_values": _common_values(one.dataset, other.dataset),
            }
        )
        leaking = np.flatnonzero(~is_constant)
        if len(leaking):
            left, right = one.path(int(rows[leaking[0]])), other.path(int(partners[leaking[0]]))
            where = left if left == right else f"{left} and {right}"
            findings.problems.append(
                f"{one.name} and {other.name} share {count(len(leaking), 'image')}, the first {where}; remove "
                "what is shared from one of them"
            )
        _judge_groups(one, other, findings)
    return found, findings


def _judge_groups(one: CheckedSet, other: CheckedSet, findings: Findings) -> None:
    """Look for groups that two sets share; their names mean the same where the sets have one folder."""
    columns = [_column(checked.dataset, "group") for checked in (one, other)]
    if any(column is None for column in columns):
        return
    groups = [np.unique(column[column != ""]).tolist() for column in columns]  # "": of a part without groups
    kind = getattr(one.dataset, "split_by", None) or "group"
    try:
        require_disjoint_groups(*groups, names=(one.name, other.name), kind=kind)
    except DatasetError as error:
        same_place = getattr(one.dataset, "root", None) == getattr(other.dataset, "root", None)
        if same_place:
            findings.problems.append(str(error))
        else:
            findings.warnings.append(f"{error}; no matter if the names mean different things in the two folders")


def _common_values(one: Any, other: Any) -> dict[str, dict[str, int]]:
    """Count the values that columns such as plate or compound have in both sets."""
    common = {}
    for name in _columns(one):
        if name in _DESCRIBES_ONE_IMAGE:
            continue
        values = [_column(dataset, name) for dataset in (one, other)]
        if all(column is not None and column.dtype.kind in "US" for column in values):
            first, second = (np.unique(column) for column in values)
            common[name] = {
                "in_both": len(np.intersect1d(first, second)),
                "in_first": len(first),
                "in_second": len(second),
            }
    return common


def _columns(dataset: Any) -> Iterable[str]:
    return dataset.metadata() if hasattr(dataset, "metadata") else ()


def _column(dataset: Any, name: str) -> np.ndarray | None:
    return np.asarray(dataset.metadata()[name]) if name in _columns(dataset) else None
