"""Retrieval: rank a gallery of images by similarity to each query, and score the rankings by labels.

A member of the gallery is relevant to a query with the same label. Members that may not be compared with the query, as
shots of the same part, are no members for it: neither hits, nor relevant, nor counted in ranks. Scores are means over
the queries that have a relevant member; the others are counted and left out. With R relevant members at ranks
r_1 < r_2 < ... < r_R (1 = most similar):

    recall at k           1 if r_1 <= k, else 0: is something right among the first k
    average precision     1/R * sum over j of j / r_j, over the whole gallery and all relevant members; its mean over
                          queries is mAP
    R-precision           share of the first R members that are relevant

Of equally similar members the earlier in the gallery (by path) is nearer. Images without a label take no part where
there are labels.

Shapes: Q queries, G gallery, K hits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2.errors import DatasetError
from dinov2.eval.columns import TARGET, label_texts, require_texts, text_column
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.ranking import Excluded, find_nearest, gather_by_query, rank_all


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """Hits of each query, and how good its ranking is."""

    queries: FeatureSet  # in the order of their paths, those that take part
    gallery: FeatureSet  # likewise; the same object as `queries` for a set against itself
    query_labels: np.ndarray | None  # [Q] str; None without labels
    gallery_labels: np.ndarray | None  # [G] str
    hits: np.ndarray  # [Q, K] int64, rows of the gallery, most similar first; -1 where there is none
    similarities: np.ndarray  # [Q, K] float64, cosines
    num_relevant: np.ndarray  # [Q] int64: R; 0 without labels
    first_rank: np.ndarray  # [Q] int64: r_1; 0 if there is none
    average_precision: np.ndarray  # [Q] float64; nan if there is none
    r_precision: np.ndarray  # [Q] float64; nan if there is none
    notes: tuple[str, ...]  # what the user should know, one sentence each

    @property
    def has_relevant(self) -> np.ndarray:
        """[Q] bool: the queries that are scored."""
        return self.num_relevant > 0

    def is_relevant(self) -> np.ndarray:
        """Tell which hits are relevant, [Q, K] bool."""
        if self.query_labels is None or self.gallery_labels is None:
            return np.zeros(self.hits.shape, dtype=bool)
        return (self.gallery_labels[self.hits] == self.query_labels[:, None]) & (self.hits >= 0)

    def values(self, ks: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the measures of each query [Q], 0..1, by the name of their mean in percent; nan: it is not scored."""
        recalls = {f"recall_at_{k}_pct": (self.first_rank <= k).astype(np.float64) for k in ks}
        measures = recalls | {"map_pct": self.average_precision, "r_precision_pct": self.r_precision}
        return {name: np.where(self.has_relevant, values, np.nan) for name, values in measures.items()}

    def scores(self, ks: Sequence[int]) -> dict[str, float]:
        """Return means over queries in percent, and of average precision also the mean over labels; empty without
        labels.
        """
        if self.query_labels is None:
            return {}
        scores = {name: 100 * float(np.nanmean(values)) for name, values in self.values(ks).items()}
        labels, average_precision = self.query_labels[self.has_relevant], self.average_precision[self.has_relevant]
        per_label = [average_precision[labels == label].mean() for label in np.unique(labels)]
        return scores | {"map_mean_per_class_pct": 100 * float(np.mean(per_label))}


def retrieve(
    queries: FeatureSet,
    gallery: FeatureSet,
    *,
    label: str = TARGET,
    exclude: Sequence[str] = (),
    num_hits: int = 10,
    device: torch.device,
) -> Retrieved:
    """Rank the gallery for every query; called by all ranks, equal results on all.

    Args:
        queries: one vector an image.
        gallery: likewise; the same object: each image is compared with all others.
        label: column of the labels, or `TARGET`; without any label in either set there are hits and no scores.
        exclude: columns; images with an equal value in one of them are not compared.
        num_hits: K, fewer if the gallery is smaller.
        device: where the ranking is computed.

    Raises:
        DatasetError: a column is missing or lacks values, one set alone has labels, or no query has a relevant member.
    """
    is_one = gallery is queries
    labels, notes = _labels_of(queries, gallery, label=label)
    kept = [_rows_in_order(features, texts) for features, texts in zip((queries, gallery), labels, strict=True)]
    queries = queries.take(kept[0])
    gallery = queries if is_one else gallery.take(kept[1])
    texts = [None if texts is None else texts[rows] for texts, rows in zip(labels, kept, strict=True)]
    excluded = _excluded(queries, gallery, exclude, is_one=is_one)
    size = len(gallery) - is_one
    if size < 1:
        raise DatasetError(f"{gallery.name}: there is no image to find; the gallery needs two at least")
    num_hits = min(num_hits, size)
    if texts[0] is None or texts[1] is None:
        similarities, hits = find_nearest(queries.values, gallery.values, excluded=excluded, k=num_hits, device=device)
        measures = torch.zeros(len(queries), 4, dtype=torch.float64)
    else:
        hits, similarities, measures = _ranked(
            queries, gallery, _numbers(texts[0], texts[1]), excluded=excluded, num_hits=num_hits, device=device
        )
        notes += _notes_on_relevant(measures[:, 0], name=queries.name, exclude=exclude)
    has_relevant = measures[:, 0] > 0
    return Retrieved(
        queries=queries,
        gallery=gallery,
        query_labels=texts[0],
        gallery_labels=texts[1],
        hits=hits.numpy(),
        similarities=similarities.numpy(),
        num_relevant=measures[:, 0].long().numpy(),
        first_rank=measures[:, 1].long().numpy(),
        average_precision=torch.where(has_relevant, measures[:, 2], torch.nan).numpy(),
        r_precision=torch.where(has_relevant, measures[:, 3], torch.nan).numpy(),
        notes=notes,
    )


def _labels_of(
    queries: FeatureSet, gallery: FeatureSet, *, label: str
) -> tuple[list[np.ndarray | None], tuple[str, ...]]:
    """Return the labels of both sets; None of both, if neither has any."""
    with_names = bool(queries.class_names and gallery.class_names)
    texts = [
        label_texts(features, label, needed_by=f"--label {label}", with_names=with_names)
        for features in (queries, gallery)
    ]
    has_labels = [bool((of_set != "").any()) for of_set in texts]
    if not any(has_labels):
        return [None, None], (f"{queries.name}: no image has a label; there are hits and no scores",)
    for features, has, other in zip((queries, gallery), has_labels, (gallery, queries), strict=True):
        if not has:
            raise DatasetError(
                f"{features.name}: no image has a label ({label}), but images of {other.name} have; label "
                "both, or neither"
            )
    notes = []
    for features, of_set in zip((queries, gallery), texts, strict=True):
        missing = int((of_set == "").sum())
        note = f"{features.name}: {missing} of {len(of_set)} images have no label and are left out"
        if missing and note not in notes:
            notes.append(note)
    return [*texts], tuple(notes)


def _rows_in_order(features: FeatureSet, labels: np.ndarray | None) -> np.ndarray:
    """Return the rows that take part, in the order of their paths."""
    paths = features.columns.get("path")
    order = np.arange(len(features)) if paths is None else np.argsort(np.asarray(paths), kind="stable")
    return order if labels is None else order[(labels != "")[order]]


def _excluded(queries: FeatureSet, gallery: FeatureSet, exclude: Sequence[str], *, is_one: bool) -> Excluded:
    """Number the values of the excluded columns alike in both sets."""
    columns = []
    for name in exclude:
        needed_by = f"--exclude-group {name}"
        texts = [text_column(features, name, needed_by=needed_by) for features in (queries, gallery)]
        for features, of_set in zip((queries, gallery), texts, strict=True):
            require_texts(of_set, name=features.name, column=name, needed_by=needed_by)
        columns.append(_numbers(*texts))
    if is_one:
        of_queries = [numbers for numbers, _ in columns]
        return Excluded.within(torch.stack(of_queries, dim=1) if columns else torch.empty(len(queries), 0).long())
    if not columns:
        return Excluded(torch.empty(len(queries), 0).long(), torch.empty(len(gallery), 0).long())
    of_queries, of_gallery = (torch.stack(numbers, dim=1) for numbers in zip(*columns, strict=True))
    return Excluded(of_queries, of_gallery)


def _numbers(of_queries: np.ndarray, of_gallery: np.ndarray) -> tuple[Tensor, Tensor]:
    """Number equal texts of both sets alike."""
    numbers = torch.from_numpy(np.unique(np.concatenate([of_queries, of_gallery]), return_inverse=True)[1])
    return numbers[: len(of_queries)], numbers[len(of_queries) :]


def _ranked(
    queries: FeatureSet,
    gallery: FeatureSet,
    labels: tuple[Tensor, Tensor],
    *,
    excluded: Excluded,
    num_hits: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hits [Q, K], their similarities, and R, r_1, average precision and R-precision of each query [Q, 4]."""
    of_queries, of_gallery = (numbers.to(device) for numbers in labels)
    found = []
    for rows, similarities, places in rank_all(queries.values, gallery.values, excluded=excluded, device=device):
        is_compared = similarities > -torch.inf
        is_relevant = (of_gallery[places] == of_queries[rows, None]) & is_compared  # [q, G]
        hits = places[:, :num_hits].masked_fill(~is_compared[:, :num_hits], -1)
        found.append((rows, hits, similarities[:, :num_hits], measure_rankings(is_relevant)))
    nothing = (
        torch.empty(0, num_hits, dtype=torch.int64),
        torch.empty(0, num_hits, dtype=torch.float64),
        torch.empty(0, 4, dtype=torch.float64),
    )
    hits, similarities, measures = gather_by_query(found, nothing=nothing)
    return hits, similarities, measures


def measure_rankings(is_relevant: Tensor) -> Tensor:
    """Compute R, r_1, average precision and R-precision of rankings; 0 where nothing is relevant.

    Args:
        is_relevant: [q, G] bool, most similar first.

    Returns:
        [q, 4] float64.
    """
    counts = is_relevant.cumsum(dim=1, dtype=torch.int32)  # [q, G]
    num_relevant = counts[:, -1]
    ranks = torch.arange(1, is_relevant.shape[1] + 1, device=is_relevant.device)
    precision = torch.where(is_relevant, counts.double() / ranks, 0)
    first = torch.where(num_relevant > 0, is_relevant.int().argmax(dim=1) + 1, 0)
    at_least_one = num_relevant.clamp(min=1)
    right_in_first = counts.gather(1, (at_least_one - 1).long()[:, None])[:, 0]
    average_precision = precision.sum(dim=1) / at_least_one
    r_precision = right_in_first / at_least_one.double()
    return torch.stack([num_relevant.double(), first.double(), average_precision, r_precision], dim=1)


def _notes_on_relevant(num_relevant: Tensor, *, name: str, exclude: Sequence[str]) -> tuple[str, ...]:
    alone = int((num_relevant == 0).sum())
    where = f" outside its own {' and '.join(exclude)}" if exclude else ""
    if alone == len(num_relevant):
        raise DatasetError(f"{name}: no query has another image of its label to find{where}; there is nothing to score")
    if not alone:
        return ()
    return (
        f"{name}: {alone} of {len(num_relevant)} queries have no image of their label to find{where}; "
        "they are left out of the scores",
    )
