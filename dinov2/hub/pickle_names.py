"""Which classes and functions a pickle refers to, read from its text: nothing is imported, built or run."""

import pickletools
import zipfile
from pathlib import Path
from typing import BinaryIO

_NUM_PICKLES = 4  # of a file of torch.save before 2020: magic number, version, system, and then what was saved
_HARMLESS = ("torch.", "collections.")  # packages whose classes a state dict of tensors needs


def pickle_names(path: Path) -> list[str]:
    """List the dotted names of the classes and functions that a file of `torch.save` refers to, in order.

    A damaged file gives what could be read of it. Names are for recognising and for sentences: a file made to mislead
    can hide some.
    """
    names: dict[str, None] = {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.rpartition("/")[2] == "data.pkl":
                        with archive.open(member) as file:
                            _collect(file, names)
        else:
            with path.open("rb") as file:
                for _ in range(_NUM_PICKLES):
                    _collect(file, names)
    except (OSError, ValueError, EOFError, IndexError, KeyError, zipfile.BadZipFile):
        pass  # the caller has an error about the damage already
    return list(names)


def foreign_names(path: Path) -> list[str]:
    """List the names of `pickle_names` that no file of tensors needs."""
    return [name for name in pickle_names(path) if not name.startswith(_HARMLESS)]


def _collect(file: BinaryIO, names: dict[str, None]) -> None:
    """Add the names in one pickle, and leave the file behind it."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            names[argument.replace(" ", ".")] = None
        elif opcode.name == "STACK_GLOBAL" and len(strings) == 2:
            names[".".join(strings)] = None
        elif isinstance(argument, str):
            strings = [*strings[-1:], argument]
