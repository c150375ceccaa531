"""Real images out of packages, fetched once into .cache/real_images: microscopy, histology, drawings."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "real_images"
_HYPERSPY = "usr/lib/python3/dist-packages/hyperspy"
_CLIPART = "usr/share/openclipart/png"


def stardist_images() -> Path:
    """Folder with histo.jpg, img2d.tif (16 bits) and img3d.tif (16 bits, 31 pages), of stardist's wheel (BSD)."""
    folder = CACHE / "stardist" / "stardist" / "data" / "images"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "stardist==0.9.2"]
        _fetch([*command, "--dest", str(CACHE)])
        with zipfile.ZipFile(next(CACHE.glob("stardist-*.whl"))) as wheel:
            wheel.extractall(CACHE / "stardist", [name for name in wheel.namelist() if "/data/images/" in name])
    return folder


def write_histology_tiles(root: Path, *, side: int = 64) -> None:
    """Write tiles of stardist's section under haematoxylin and eosin, and one of glass, with labels in files.csv.

    Its halves are two slides, one paler; tiles are dense (darker than the section) or loose.
    """
    section = np.asarray(Image.open(stardist_images() / "histo.jpg").convert("RGB"))
    rows = ["tile,label,slide"]
    for top in range(0, section.shape[0] - side + 1, side):
        for left in range(0, section.shape[1] - side + 1, side):
            tile = section[top : top + side, left : left + side]
            slide = "left" if left < section.shape[1] // 2 else "right"
            label = "dense" if tile.mean() < section.mean() else "loose"
            if slide == "right":
                tile = 255 - (255 - tile.astype(np.float64)) * 0.6
            name = f"{slide}/{top}_{left}.png"
            (root / slide).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(tile).astype(np.uint8)).save(root / name)
            rows.append(f"{name},{label},{slide}")
    Image.new("RGB", (side, side), (255, 255, 255)).save(root / "left" / "glass.png")
    rows.append("left/glass.png,,left")
    (root / "files.csv").write_text("\n".join(rows) + "\n")


def hyperspy_folder() -> Path:
    """Folder of the Debian package python3-hyperspy (GPL): micrographs in tests/io/tiff_files and as HDF5 elsewhere."""
    folder = CACHE / "hyperspy" / _HYPERSPY
    if not folder.is_dir():
        package = _debian_package("python3-hyperspy")
        _fetch(["dpkg", "-x", str(package), str(CACHE / "hyperspy")])
    return folder


def clipart_folder() -> Path:
    """Folder of the Debian package openclipart-png (public domain) with drawings of animals, a folder for each kind."""
    folder = CACHE / "clipart" / _CLIPART / "animals"
    if not folder.is_dir():
        package = _debian_package("openclipart-png")
        (CACHE / "clipart").mkdir(parents=True, exist_ok=True)
        unpack = f"dpkg --fsys-tarfile '{package}' | tar -x -C '{CACHE / 'clipart'}' ./{_CLIPART}/animals"
        _fetch(["sh", "-c", unpack])
    return folder


def _debian_package(name: str) -> Path:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip(f"needs apt-get and dpkg to fetch {name}")
    CACHE.mkdir(parents=True, exist_ok=True)
    if not list(CACHE.glob(f"{name}_*.deb")):
        _fetch(["apt-get", "download", name])
    return next(CACHE.glob(f"{name}_*.deb"))


def _fetch(command: list[str]) -> None:
    """Run a command; without its network or tool, the test is skipped with the reason."""
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command, cwd=CACHE, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"real images cannot be fetched: {error}")
