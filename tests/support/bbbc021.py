"""A small BBBC021 in the real layout and schema, with cells drawn so that the mechanism of action can be seen."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tifffile

CHANNEL_FILES = {"DAPI": "w1", "Tubulin": "w2", "Actin": "w4"}
DATES = {"Week1": "150607", "Week2": "180607", "Week3": "290607"}


@dataclass(frozen=True)
class Look:
    """How cells under a mechanism of action look."""

    num_cells: int = 7
    nucleus: float = 5.0  # radius, px of an image of 64 px
    nuclei: int = 1  # of a cell
    tubulin: float = 1.0  # brightness
    spread: float = 1.0  # of tubulin around the nucleus
    has_rim: bool = True  # of actin; else it lies in spots


LOOKS = {
    "DMSO": Look(),
    "Actin disruptors": Look(has_rim=False, num_cells=6),
    "Microtubule stabilizers": Look(nuclei=3, nucleus=3.0, tubulin=2.0, spread=0.7),
    "DNA damage": Look(nucleus=8.0, num_cells=4),
    "Protein synthesis": Look(nucleus=3.5, tubulin=0.4, num_cells=9),
}
TREATMENTS = (
    ("DMSO", 0.0, "DMSO"),
    ("cytochalasin B", 10.0, "Actin disruptors"),
    ("latrunculin B", 3.0, "Actin disruptors"),
    ("taxol", 0.1, "Microtubule stabilizers"),
    ("epothilone B", 0.3, "Microtubule stabilizers"),
    ("etoposide", 3.0, "DNA damage"),
    ("mitomycin C", 1.0, "DNA damage"),
    ("emetine", 0.1, "Protein synthesis"),
    ("anisomycin", 1.0, "Protein synthesis"),
)


def make_bbbc021(
    root: Path,
    *,
    plates: Sequence[str] = ("Week1_22123", "Week2_24121"),
    treatments: Sequence[tuple[str, float, str | None]] = TREATMENTS,
    sites: int = 2,
    size: tuple[int, int] = (80, 64),
    nesting: str = "week",
    writes_images: bool = True,
) -> pd.DataFrame:
    """Write BBBC021_v1_image.csv, BBBC021_v1_moa.csv and the images.

    Args:
        root: created if need be.
        plates: each gets one well for each treatment.
        treatments: compound, concentration, MOA; None: one that the MOA table does not have.
        sites: fields of view of a well.
        size: width and height, px.
        nesting: where the images are: week, Week1/Week1_22123; plate, Week1_22123; archive, as the archives unpack.
        writes_images: false: empty files in their place.

    Returns:
        The table of images.
    """
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for table, plate in enumerate(plates, start=1):
        week = plate.partition("_")[0]
        folder = {"week": f"{week}/{plate}", "plate": plate, "archive": f"BBBC021_v1_images_{plate}/{plate}"}[nesting]
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number, (compound, concentration, moa) in enumerate(treatments):
            well = f"{'BCDEFG'[number // 10]}{number % 10 + 2:02d}"
            for site in range(1, sites + 1):
                stem = f"{week}_{DATES.get(week, '010808')}_{well}_s{site}"
                names = {
                    channel: f"{stem}_{wave}{str(uuid.UUID(bytes=rng.bytes(16))).upper()}.tif"
                    for channel, wave in CHANNEL_FILES.items()
                }
                planes = draw_cells(LOOKS[moa or "DMSO"], rng=rng, size=size) if writes_images else {}
                for channel, name in names.items():
                    (root / folder / name).touch()
                    if writes_images:
                        tifffile.imwrite(root / folder / name, planes[channel], photometric="minisblack")
                row = {"TableNumber": table, "ImageNumber": len(rows) + 1}
                for channel, name in names.items():
                    row |= {f"Image_FileName_{channel}": name, f"Image_PathName_{channel}": f"{week}/{plate}"}
                row |= {"Image_Metadata_Plate_DAPI": plate, "Image_Metadata_Well_DAPI": well, "Replicate": table}
                row |= {"Image_Metadata_Compound": compound, "Image_Metadata_Concentration": concentration}
                rows.append(row)
    images = pd.DataFrame(rows)
    images.to_csv(root / "BBBC021_v1_image.csv", index=False)
    moas = [(compound, f"{concentration:.2f}", moa) for compound, concentration, moa in treatments if moa is not None]
    pd.DataFrame(moas, columns=["compound", "concentration", "moa"]).to_csv(root / "BBBC021_v1_moa.csv", index=False)
    return images


def make_annotated_csv(root: Path, images: pd.DataFrame, *, prefix: str = "../datasets/bbbc021/") -> Path:
    """Write a flat table in a lab's style: whole paths in the columns of file names, numbers for names."""
    table = pd.DataFrame()
    for channel in CHANNEL_FILES:
        folders = images[f"Image_PathName_{channel}"].str.split("/").str[-1]
        names = images[f"Image_FileName_{channel}"]
        table[f"Image_FileName_{channel}"] = prefix + "BBBC021_v1_images_" + folders + "/" + folders + "/" + names
    moas = {(compound, concentration): moa for compound, concentration, moa in TREATMENTS}
    keys = zip(images["Image_Metadata_Compound"], images["Image_Metadata_Concentration"], strict=True)
    table["Unique_MoA"] = pd.factorize(pd.Series([moas[key] for key in keys]))[0]
    table["Unique_Compounds"] = pd.factorize(images["Image_Metadata_Compound"])[0]
    table["Unique_Treatments"] = table["Unique_Compounds"]
    table["Replicate"] = images["Replicate"]
    table["Plate"] = pd.factorize(images["Image_Metadata_Plate_DAPI"])[0]
    table["Batch"] = table["Plate"]
    path = root / "BBBC021_annotated_fixed.csv"
    table.to_csv(path, index=False)
    return path


def draw_cells(look: Look, *, rng: np.random.Generator, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Draw one field of view: planes [height, width] of uint16, by channel; background about 300, cells up to 9000."""
    width, height = size
    down, across = np.mgrid[:height, :width].astype(np.float32)
    unit = min(size) / 64
    planes = {channel: np.zeros((height, width), dtype=np.float32) for channel in CHANNEL_FILES}
    for _ in range(look.num_cells):
        top, left = rng.uniform(0.1, 0.9) * height, rng.uniform(0.1, 0.9) * width
        distance = np.hypot(down - top, across - left) / unit
        angle = np.arctan2(down - top, across - left)
        body = np.exp(-((distance / (12 * look.spread)) ** 2))
        fibres = 0.6 + 0.4 * np.cos(9 * angle + rng.uniform(0, 6))
        planes["Tubulin"] = np.maximum(planes["Tubulin"], look.tubulin * body * fibres)
        for _ in range(look.nuclei):
            shift = rng.normal(0, 3, 2) * unit if look.nuclei > 1 else (0, 0)
            around = np.hypot(down - top - shift[0], across - left - shift[1]) / unit
            nucleus = 1 / (1 + np.exp((2 * (around - look.nucleus)).clip(max=50)))
            planes["DAPI"] = np.maximum(planes["DAPI"], nucleus * rng.uniform(0.7, 1.0))
        if look.has_rim:
            planes["Actin"] = np.maximum(planes["Actin"], np.exp(-(((distance - 11) / 1.5) ** 2)))
        else:
            spots = np.cos(down / unit * 1.7) * np.cos(across / unit * 1.7)
            planes["Actin"] = np.maximum(planes["Actin"], body * (spots > 0.7))
    return {
        channel: (300 + 4000 * plane + rng.normal(0, 40, plane.shape)).clip(0, 65535).astype(np.uint16)
        for channel, plane in planes.items()
    }
