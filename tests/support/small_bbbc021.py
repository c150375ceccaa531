"""Ways into the small BBBC021 of `support.bbbc021` that several test files share."""

import pandas as pd
import pytest
import tifffile

from dinov2.data import make_dataset
from dinov2.errors import DatasetError
from support.bbbc021 import TREATMENTS

IMAGES, MOAS = "BBBC021_v1_image.csv", "BBBC021_v1_moa.csv"
FEW = TREATMENTS[:4]


def bbbc021(root, *, channels=3, cache_dir=None, max_image_pixels=None, **options):
    text = f"BBBC021:root='{root}'" + "".join(f":{key}={value}" for key, value in options.items())
    return make_dataset(text, channels=channels, cache_dir=cache_dir, max_image_pixels=max_image_pixels)


def sentence(root, kind=DatasetError, **options):
    with pytest.raises(kind) as error:
        bbbc021(root, **options)
    return str(error.value).replace(str(root), "ROOT")


def change(root, name=IMAGES, **values):
    """Change cells of a table: column=(row, value)."""
    table = pd.read_csv(root / name, dtype=str, keep_default_na=False)
    for column, (row, value) in values.items():
        table.loc[row, column] = value
    table.to_csv(root / name, index=False)


def raw(root, row, channel="DAPI"):
    """Values of one channel of an image, [H, W]."""
    table = pd.read_csv(root / IMAGES)
    folder, name = table[f"Image_PathName_{channel}"][row], table[f"Image_FileName_{channel}"][row]
    return tifffile.imread(root / folder / name)
