"""Scores of a protocol: each profile is classified by the profiles that it may be compared with.

Shapes: n images, p profiles, D features, C labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dinov2.errors import DatasetError
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.labels import LabelledSet
from dinov2.eval.predictions import Predictions
from dinov2.eval.profile_normalization import Step, normalize
from dinov2.eval.profiles import Images, Profiles, build_profiles, take_images, text_of, values_of
from dinov2.eval.protocol_classifiers import logistic_probabilities, num_neighbours, votes_of_neighbours
from dinov2.eval.protocol_forms import Level, Protocol
from dinov2.eval.ranking import Excluded, find_nearest


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Profiles of one protocol and how they were classified, in the order of their names."""

    protocol: Protocol
    name: str  # of the dataset
    profiles: Profiles  # those that are classified
    labels: np.ndarray  # [p] str
    excluding: Mapping[str, np.ndarray]  # [p] str each: values of the excluded columns
    wholes: np.ndarray  # [p] int64: number of the profile that this is a part of, if many=split takes them apart
    class_names: tuple[str, ...]
    scores: np.ndarray  # [p, C] float64
    has_right: np.ndarray  # [p] bool: may be compared with another profile of its label
    nearest: np.ndarray  # [p] int64: most similar profile that it may be compared with, -1 if there is none
    similarity: np.ndarray  # [p] float64: its cosine, nan if there is none
    places: np.ndarray  # [p] int64: first place in the dataset of an image of the profile
    notes: tuple[str, ...]  # what the user should know, one sentence each
    left_out: tuple[str, ...]  # labels that can never be right and are left out

    @cached_property
    def targets(self) -> np.ndarray:
        """Number of the label of each profile, [p] int64."""
        return np.searchsorted(self.class_names, self.labels)

    @cached_property
    def is_right(self) -> np.ndarray:
        """[p] bool."""
        return (self.scores.argmax(axis=1) == self.targets) & self.has_right

    def predictions(self, *, rows: str = "profiles") -> Predictions:
        """Return the profiles as rows of metrics; their groups are the values of the first excluded column.

        Args:
            rows: what the profiles are, plural, for the screen.
        """
        groups = self.excluding[self.protocol.exclude[0]] if self.protocol.exclude else None
        return Predictions(
            name=self.name,
            targets=np.where(self.has_right, self.targets, -1),
            scores=self.scores,
            class_names=self.class_names,
            groups=None if groups is None else np.unique(groups, return_inverse=True)[1],
            places=self.places,
            paths=self.profiles.names,
            columns={
                **self.excluding,
                "target": self.labels,
                "nearest": np.where(self.nearest < 0, "", self.profiles.names[self.nearest]),
                "nearest_target": np.where(self.nearest < 0, "", self.labels[self.nearest]),
                "similarity": self.similarity,
                "num_images": np.array([len(images) for images in self.profiles.members]),
            },
            rows=rows,
        )

    @property
    def num_wholes(self) -> int:
        """Number of profiles, those counted once that were split."""
        return len(np.unique(self.wholes))

    def accuracy_pct(self) -> float:
        """Percent of the profiles that are right; one of several parts counts with the share of its parts."""
        return _mean_of_means(self.is_right, self.wholes)

    def accuracy_by(self, column: str) -> dict[str, tuple[int, float]]:
        """Return number of profiles and percent of them that are right, for each value of an excluded column."""
        values = self.excluding[column]
        return {
            str(value): (
                len(np.unique(self.wholes[values == value])),
                _mean_of_means(self.is_right[values == value], self.wholes[values == value]),
            )
            for value in np.unique(values)
        }


def _mean_of_means(is_right: np.ndarray, wholes: np.ndarray) -> float:
    """Average over the parts of each whole, then over the wholes, in percent."""
    _, inverse, sizes = np.unique(wholes, return_inverse=True, return_counts=True)
    return 100 * float((np.bincount(inverse, weights=is_right) / sizes).mean())


def score_protocol(
    features: FeatureSet, protocol: Protocol, *, normalization: Sequence[Step] = (), device: torch.device
) -> Scored:
    """Build the profiles of a protocol, classify them and find out which are right; called by all ranks.

    Args:
        features: one vector an image.
        protocol: see `Protocol`.
        normalization: fitted to the features of the images before they are averaged.
        device: where similarities are computed.

    Raises:
        DatasetError: a column, labels or controls are missing, or no label can be right.
        ConfigError: k is not below the number of profiles.
        CheckpointError: features are not finite.
    """
    also = {step.column: f"--normalize {step}" for step in normalization if step.column is not None}
    images = take_images(features, protocol, also=also)
    if normalization:
        values = normalize(
            images.values.double().numpy(),
            normalization,
            is_control=images.is_control,
            columns=images.columns,
            name=images.name,
        )
        images = replace(images, values=torch.from_numpy(values))
    images = images if not images.is_control.any() else images.take(~images.is_control)
    profiles, wholes = _profiles_of(images, protocol)
    labels = _one_label_each(profiles, images, protocol=protocol)
    excluding = {
        column: np.array([text_of(values) for values in values_of(profiles, images.columns[column])], dtype=str)
        for column in protocol.exclude
    }
    return _classify(
        _Prepared(
            protocol=protocol, images=images, profiles=profiles, wholes=wholes, labels=labels, excluding=excluding
        ),
        device=device,
    )


def _profiles_of(images: Images, protocol: Protocol) -> tuple[Profiles, np.ndarray]:
    """Build the profiles, and number the whole that each is a part of."""
    profiles = build_profiles(images, protocol.aggregate)
    if protocol.many == "same" or not protocol.aggregate:
        return profiles, np.arange(len(profiles))
    last = protocol.aggregate[-1]
    added = [
        column
        for column in protocol.exclude
        if any(len(values) > 1 for values in values_of(profiles, images.columns[column]))
    ]
    if not added:
        return profiles, np.arange(len(profiles))
    parts = build_profiles(images, (*protocol.aggregate[:-1], Level((*last.columns, *added), last.statistic)))
    whole_of_image = np.empty(len(images), dtype=np.int64)
    for number, rows in enumerate(profiles.members):
        whole_of_image[rows] = number
    return parts, np.array([whole_of_image[rows[0]] for rows in parts.members])


def _one_label_each(profiles: Profiles, images: Images, *, protocol: Protocol) -> np.ndarray:
    """Return the label of each profile."""
    found = values_of(profiles, images.labels)
    for name, labels in zip(profiles.names, found, strict=True):
        if len(labels) > 1:
            raise DatasetError(
                f"{images.name}: the images of {name} have several labels ({protocol.label}: {', '.join(labels[:3])}), "
                f"but protocol {protocol.name} makes one profile of them ({protocol.aggregate[-1]})"
            )
    return np.array([labels[0] for labels in found], dtype=str)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Profiles before they are classified."""

    protocol: Protocol
    images: Images
    profiles: Profiles
    wholes: np.ndarray  # as in `Scored`
    labels: np.ndarray
    excluding: Mapping[str, np.ndarray]

    def take(self, rows: np.ndarray) -> "_Prepared":
        """Keep some profiles, given as a mask."""
        numbers = np.flatnonzero(rows)
        profiles = Profiles(
            values=self.profiles.values[torch.from_numpy(numbers)],
            names=self.profiles.names[numbers],
            members=[self.profiles.members[number] for number in numbers],
        )
        return replace(
            self,
            profiles=profiles,
            wholes=self.wholes[rows],
            labels=self.labels[rows],
            excluding={column: values[rows] for column, values in self.excluding.items()},
        )

    def codes(self) -> np.ndarray:
        """Number the values of the excluded columns, [p, E] int64."""
        columns = [np.unique(values, return_inverse=True)[1] for values in self.excluding.values()]
        return np.stack(columns, axis=1).astype(np.int64) if columns else np.empty((len(self.labels), 0), np.int64)


def _classify(prepared: _Prepared, *, device: torch.device) -> Scored:
    protocol, name = prepared.protocol, prepared.images.name
    has_right = find_answerable(prepared.labels, prepared.codes())
    hopeless = sorted(set(prepared.labels) - set(prepared.labels[has_right]))
    if len(hopeless) == len(set(prepared.labels)):
        several = any(len(values) > 1 for column in protocol.exclude for values in _values(prepared, column))
        raise DatasetError(
            f"{name}: protocol {protocol.name} can be right for no label ({protocol.label}): no two profiles of a "
            f"label differ in {' and '.join(protocol.exclude) or 'image'}"
            + ("; many=split takes profiles of several values apart" if several else "")
        )
    notes: tuple[str, ...] = _notes_of_hopeless(prepared, hopeless)
    if protocol.unanswerable == "drop":
        is_kept = ~np.isin(prepared.labels, hopeless)
        prepared, has_right = prepared.take(is_kept), has_right[is_kept]
    alone = int((~has_right & ~np.isin(prepared.labels, hopeless)).sum())
    if alone:
        notes += (f"{name}: {alone} profiles may be compared with none of their label; they count as wrong",)
    class_names = tuple(np.unique(prepared.labels).tolist())
    if len(class_names) == 1:
        raise DatasetError(
            f"{name}: all profiles have one label ({class_names[0]}); protocol {protocol.name} needs two"
        )
    values, codes = prepared.profiles.values, torch.from_numpy(prepared.codes())
    targets = torch.from_numpy(np.searchsorted(class_names, prepared.labels))
    similarities, nearest = find_nearest(
        values, values, excluded=Excluded.within(codes), k=num_neighbours(protocol, len(values)), device=device
    )
    if protocol.classifier == "knn":
        scores = votes_of_neighbours(
            similarities, nearest, targets, temperature=protocol.temperature, num_classes=len(class_names)
        )
    else:
        scores = logistic_probabilities(values, targets, codes, c=protocol.c, num_classes=len(class_names))
    return Scored(
        protocol=protocol,
        name=name,
        profiles=prepared.profiles,
        labels=prepared.labels,
        excluding=prepared.excluding,
        wholes=prepared.wholes,
        class_names=class_names,
        scores=scores,
        has_right=has_right,
        nearest=nearest[:, 0].numpy(),
        similarity=np.where(nearest[:, 0] < 0, np.nan, similarities[:, 0]),
        places=np.array([prepared.images.places[rows].min() for rows in prepared.profiles.members]),
        notes=notes,
        left_out=tuple(hopeless) if protocol.unanswerable == "drop" else (),
    )


def _values(prepared: _Prepared, column: str) -> list[list[str]]:
    return values_of(prepared.profiles, prepared.images.columns[column])


def find_answerable(labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Tell which profiles may be compared with another of their label.

    Args:
        labels: [p] str.
        codes: numbers of the values of the excluded columns, [p, E]; equal in one column: not compared.

    Returns:
        [p] bool.
    """
    found = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kinds, inverse, sizes = np.unique(codes[rows], axis=0, return_inverse=True, return_counts=True)
        if codes.shape[1] == 0:
            found[rows] = len(rows) > 1
            continue
        is_good = np.array([(kinds != kind).all(axis=1).any() for kind in kinds])
        found[rows] = is_good[inverse.reshape(-1)]
    return found


def _notes_of_hopeless(prepared: _Prepared, hopeless: Sequence[str]) -> tuple[str, ...]:
    if not hopeless:
        return ()
    protocol = prepared.protocol
    labels = LabelledSet(name="", targets=np.empty(0, dtype=np.int64), class_names=hopeless)
    count = int(np.isin(prepared.labels, hopeless).sum())
    what = "are left out" if protocol.unanswerable == "drop" else "count as wrong"
    excluded = " and ".join(protocol.exclude) or "image"
    return (
        f"{prepared.images.name}: {len(hopeless)} labels ({labels.describe(range(len(hopeless)))}) have no two "
        f"profiles that differ in {excluded}, so protocol {protocol.name} could never be right; their {count} "
        f"profiles {what}",
    )


def details_of(scored: Scored) -> dict[str, Any]:
    """Settle for the results file what was compared with what, and the scores of every compound, plate or group."""
    protocol = scored.protocol
    return {
        "protocol": str(protocol),
        "num_profiles": scored.num_wholes,
        "num_images": int(sum(len(rows) for rows in scored.profiles.members)),
        "labels": list(scored.class_names),
        "labels_left_out": list(scored.left_out),
        "num_without_comparable_profile_of_their_label": int((~scored.has_right).sum()),
        "notes": list(scored.notes),
        **{
            f"by_{column}": {
                value: {"num_profiles": count, "accuracy_pct": accuracy}
                for value, (count, accuracy) in scored.accuracy_by(column).items()
            }
            for column in protocol.exclude
        },
    }
