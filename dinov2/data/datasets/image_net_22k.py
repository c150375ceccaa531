"""`ImageNet22k`: ImageNet's 14 million photographs of 21,841 classes, read out of one tar archive a class.

    imagenet22k/
        n00004475.tar         members n00004475_6590.JPEG, ...; some are compressed with gzip, as they were published
        n00005787.tar
        ...

Dataset string, as in the official code: `ImageNet22k:root=imagenet22k:extra=imagenet22k_extra`. The list of members is
made on first use, which reads the headers of all archives, and kept in the folder `extra`, or, without that key, in
data.cache_dir.
Source: layout and keys of the parents' dataset of this name; Deng et al. 2009.
"""

import os
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from dinov2.data.datasets.folder_images import FolderImages
from dinov2.data.index import Index, Strings, counted, stored_index
from dinov2.errors import DatasetError

_SUFFIX = ".tar"
_GZIP = b"\x1f\x8b"
_GZIP_WINDOW = 16 + zlib.MAX_WBITS  # tells zlib to expect gzip's header
_MAX_FILE_BYTES = 1 << 28  # of a photograph, unpacked


class ImageNet22k(FolderImages):
    """Photographs in the order of their archives and of the members there; the archives are the classes.

    Args:
        root: folder of the archives; `~` is the home folder.
        extra: folder for what is found out about the files; made if needed.
        cache_dir: takes the place of `extra`, if that is not given.
        options: other arguments of `ExtendedVisionDataset`; a split is found by a hash of class and member.

    Raises:
        ConfigError: an option is wrong.
        DatasetError: the folder is missing or holds no archives, or an archive is damaged.
    """

    def __init__(self, *, root: str, extra: str | None = None, cache_dir: str | None = None, **options: Any) -> None:
        super().__init__(cache_dir=extra or cache_dir, **options)
        self.root = os.path.expanduser(root)
        names = _archives(root, self.root)
        stamps = [os.stat(os.path.join(self.root, name)) for name in names]
        files = stored_index(
            self.cache_dir,
            name="imagenet22k",
            key=[os.path.realpath(self.root), names, [[stamp.st_size, stamp.st_mtime_ns] for stamp in stamps]],
            build=lambda: _list_members(self.root, names),
        )
        self.use_files(files)

    def path(self, index: int) -> str:
        folder, _, member = os.fsdecode(self.relative_path(index)).partition("/")
        return os.path.join(self.root, folder + _SUFFIX, member)

    def get_image_data(self, index: int) -> bytes:
        row = self.row(index)
        folder = os.fsdecode(self.files["path"][row].partition(b"/")[0])
        start, size = int(self.files["start"][row]), int(self.files["size"][row])
        with open(os.path.join(self.root, folder + _SUFFIX), "rb") as file:
            data = os.pread(file.fileno(), size, start)
        if len(data) < size:
            raise DatasetError(f"the archive ends at byte {start + len(data)}, the image at byte {start + size}")
        return _unzip(data) if data.startswith(_GZIP) else data


def _archives(given: str, root: str) -> list[str]:
    """Names of the archives, sorted."""
    expected = f"expected one archive a class, such as {given}/n00004475{_SUFFIX}"
    if not os.path.isdir(root):
        raise DatasetError(f"dataset ImageNet22k: folder {given} does not exist; {expected}")
    names = sorted(entry.name for entry in os.scandir(root) if entry.name.endswith(_SUFFIX) and entry.is_file())
    if not names:
        raise DatasetError(
            f"dataset ImageNet22k: folder {given} holds no {_SUFFIX} files; {expected}; for folders of images, use "
            f"ImageFolder:root={given}"
        )
    return names


def _list_members(root: str, names: list[str]) -> Index:
    """Find the members of all archives."""
    starts, sizes = array("q"), array("q")

    def paths() -> Iterator[bytes]:
        for name in names:
            folder = os.fsencode(name.removesuffix(_SUFFIX))
            for member in _members(os.path.join(root, name)):
                starts.append(member.offset_data)
                sizes.append(member.size)
                yield folder + b"/" + member.name.encode("utf-8", "surrogateescape")

    packed = Strings.pack(counted(paths(), description=f"listing the archives in {root}", unit="images"))
    if not len(packed):
        raise DatasetError(f"dataset ImageNet22k: the {len(names)} archives in {root} are empty")
    return Index({"path": packed, "start": np.array(starts), "size": np.array(sizes)})


def _members(path: str) -> Iterator[tarfile.TarInfo]:
    """Plain files of an archive, which lie in it whole."""
    end = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.offset_data + member.size > end:
                    raise DatasetError(f"archive {path} is cut off in {member.name}; copy it anew")
                if member.isreg() and not member.issparse():
                    yield member
    except (tarfile.TarError, EOFError) as error:
        raise DatasetError(f"archive {path} cannot be read: {error}") from error


def _unzip(data: bytes) -> bytes:
    """Unpack a photograph, of bounded size."""
    unpacking = zlib.decompressobj(_GZIP_WINDOW)
    try:
        unpacked = unpacking.decompress(data, _MAX_FILE_BYTES)
    except zlib.error as error:
        raise DatasetError(f"damaged gzip data ({error})") from error
    if not unpacking.eof:
        raise DatasetError(f"its gzip data are cut off, or hold more than {_MAX_FILE_BYTES} bytes")
    return unpacked
