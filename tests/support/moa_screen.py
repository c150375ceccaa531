"""A small BBBC021 whose weeks hold different treatments, as those of the real one: for NSC and NSCB from images on."""

from pathlib import Path

import pandas as pd

from support.bbbc021 import TREATMENTS, make_bbbc021

_BY_NAME = {treatment[0]: treatment for treatment in TREATMENTS}
# taxol is in both weeks; protein synthesis inhibitors are in week 2 only
WEEKS = {
    1: ("DMSO", "cytochalasin B", "taxol", "etoposide"),
    2: ("DMSO", "latrunculin B", "taxol", "epothilone B", "mitomycin C", "emetine", "anisomycin"),
}


def make_moa_screen(root: Path, *, num_plates: int = 2, sites: int = 2, **options) -> None:
    """Write tables and images of `num_plates` plates a week; see `make_bbbc021`."""
    tables = {"BBBC021_v1_image.csv": [], "BBBC021_v1_moa.csv": []}
    for week, names in WEEKS.items():
        plates = [f"Week{week}_{week}000{plate}" for plate in range(num_plates)]
        treatments = [_BY_NAME[name] for name in names]
        make_bbbc021(root, plates=plates, treatments=treatments, sites=sites, **options)
        for name, parts in tables.items():
            parts.append(pd.read_csv(root / name))
    for name, parts in tables.items():
        pd.concat(parts).drop_duplicates().to_csv(root / name, index=False)
