"""Made-up files in the published layouts of Imagenette, ImageNet100, ImageNet and ImageNet22k."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from support.images import encode, photo

SIZE = (16, 12)  # px
IMAGENETTE_CLASSES = ("n03888257", "n01440764", "n03028079")
IMAGE_NET_CLASSES = ("n02012849", "n01440764", "n03126707")
IMAGE_NET_100_FOLDERS = {
    "n02012849": "train.X1",
    "n01440764": "train.X1",
    "n03126707": "train.X2",
    "n02500267": "train.X3",
    "n01514668": "train.X4",
}
_IMAGE_NET_100_TITLES = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n01514668": "cock",
}


def write(path: Path, number: int = 0, *, size: tuple[int, int] = SIZE) -> None:
    """Write a photograph and make its folder; each number gives another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(photo(number, size=size)))


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_imagenette(root: Path, *, size: tuple[int, int] = SIZE) -> None:
    """Write 3 classes, of each 3 photographs for training and 2 for validation."""
    for split, count in (("train", 3), ("val", 2)):
        for name in IMAGENETTE_CLASSES:
            for number in range(count):
                write(root / split / name / f"{name}_{number}.JPEG", number, size=size)
    (root / "noisy_imagenette.csv").write_text("path,noisy_labels_0\n")


def write_image_net_100(root: Path, *, size: tuple[int, int] = SIZE) -> None:
    """Write 5 classes, of each 2 photographs for training and 1 for validation."""
    for name, folder in IMAGE_NET_100_FOLDERS.items():
        for place, count in ((folder, 2), ("val.X", 1)):
            for number in range(count):
                write(root / place / name / f"{number}.JPEG", number, size=size)
    (root / "Labels.json").write_text(json.dumps(_IMAGE_NET_100_TITLES))


def write_image_net(root: Path, *, size: tuple[int, int] = SIZE) -> None:
    """Write 3 classes, of each 2 photographs for training and 1 for validation, and 1 without a label."""
    for number, name in enumerate(IMAGE_NET_CLASSES):
        write(root / "train" / name / f"{name}_{number}.JPEG", number, size=size)
        write(root / "train" / name / f"{name}_9.JPEG", number, size=size)
        write(root / "val" / name / f"ILSVRC2012_val_0000000{number}.JPEG", number, size=size)
    write(root / "test" / "ILSVRC2012_test_00000001.JPEG", size=size)
    (root / "labels.txt").write_text('n01440764,tench\nn02012849,crane\nn03126707,"crane"\n\n')


def write_image_net_22k(root: Path, *, size: tuple[int, int] = SIZE) -> None:
    """Write 2 archives of 3 photographs, one of them compressed, and a link that must not be followed."""
    root.mkdir(parents=True)
    for number, name in enumerate(("n00005787", "n00004475")):
        with tarfile.open(root / f"{name}.tar", "w") as archive:
            for image in range(3):
                data = encode(photo(10 * number + image, size=size), "PNG")
                add(archive, f"{name}_{image}.JPEG", gzip.compress(data) if image == 1 else data)
            link = tarfile.TarInfo(f"{name}_link.JPEG")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    (root / "readme.txt").write_text("x")


WRITERS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        "Imagenette": write_imagenette,
        "ImageNet100": write_image_net_100,
        "ImageNet": write_image_net,
        "ImageNet22k": write_image_net_22k,
    }
)
