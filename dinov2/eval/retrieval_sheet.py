"""Contact sheet of retrieval: some queries, each with its most similar images, framed green where they are right."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dinov2.data.contact_sheet import Cell, Row, draw_sheet, find_window, show_colours
from dinov2.data.raw_pixels import as_fractions, open_image, read_shown_pixels
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.retrieval_scores import Retrieved

RIGHT, WRONG, QUERY = (20, 150, 60), (200, 30, 30), (110, 110, 110)


def choose_queries(retrieved: Retrieved, count: int) -> np.ndarray:
    """Choose queries from the worst average precision to the best, evenly; by path where there are no scores.

    Returns:
        Rows of the queries, at most `count`.
    """
    rows = np.flatnonzero(retrieved.has_relevant)
    if len(rows):
        rows = rows[np.argsort(retrieved.average_precision[rows], kind="stable")]
    else:
        rows = np.arange(len(retrieved.queries))
    count = min(count, len(rows))
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]


def write_sheet(
    retrieved: Retrieved, path: Path, *, queries: Any, gallery: Any, num_queries: int, num_shown: int, heading: str
) -> None:
    """Draw queries and hits, a row a query.

    Args:
        retrieved: what was found.
        path: of the picture.
        queries: dataset of the queries, images by place.
        gallery: dataset of the gallery.
        num_queries: rows.
        num_shown: hits of each, fewer where fewer were found.
        heading: first line.

    Raises:
        ConfigError: the picture cannot be written.
    """
    rows = [
        _row(retrieved, int(query), queries=queries, gallery=gallery, num_shown=num_shown)
        for query in choose_queries(retrieved, num_queries)
    ]
    lines = [heading, "left: the query; right: the most similar images, most similar first"]
    if retrieved.query_labels is not None:
        lines.append("green: same label; red: another label; queries from the worst average precision to the best")
    try:
        draw_sheet(rows, heading=lines).save(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another --output-dir") from error


def _row(retrieved: Retrieved, query: int, *, queries: Any, gallery: Any, num_shown: int) -> Row:
    """Pictures of one query and its hits."""
    labels = retrieved.gallery_labels
    own = "" if retrieved.query_labels is None else str(retrieved.query_labels[query])
    cells = [_cell(queries, retrieved.queries, query, words=f"query {own}".strip(), frame=QUERY)]
    is_relevant = retrieved.is_relevant()[query]
    for rank in range(min(num_shown, retrieved.hits.shape[1])):
        hit = int(retrieved.hits[query, rank])
        if hit < 0:
            break
        label = "" if labels is None else str(labels[hit])
        frame = None if labels is None else RIGHT if is_relevant[rank] else WRONG
        words = f"{retrieved.similarities[query, rank]:.3f} {label}".strip()
        cells.append(_cell(gallery, retrieved.gallery, hit, words=words, frame=frame))
    caption = path_of(retrieved.queries, query)
    if retrieved.has_relevant[query]:
        caption += f"   average precision {100 * retrieved.average_precision[query]:.1f} %"
        caption += f", first right at rank {retrieved.first_rank[query]}, {retrieved.num_relevant[query]} to find"
    return Row(caption, cells)


def _cell(dataset: Any, features: FeatureSet, row: int, *, words: str, frame: tuple[int, int, int] | None) -> Cell:
    try:
        pixels = _shown(open_image(dataset, int(features.places[row])))
    except DatasetError as error:  # it could be read when its features were computed
        raise DatasetError(f"{path_of(features, row)} cannot be read: {error}") from error
    return Cell(show_colours(as_fractions(pixels), find_window(pixels)), words, frame)


def _shown(image: Any) -> np.ndarray:
    """Pixels [C, H, W], uint8 or uint16; what the user's own class has transformed fills the whole range."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        return read_shown_pixels(image)
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp(min=1e-12) * 255).round().byte().numpy()


def path_of(features: FeatureSet, row: int) -> str:
    """Path of an image; its place in the dataset, if that tells no paths."""
    return str(features.columns["path"][row]) if "path" in features.columns else f"item {features.places[row]}"
