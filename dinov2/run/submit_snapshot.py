"""A copy of the code for a job, so that editing while it waits in the queue does not change it."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dinov2.configs.files import write_as_one_file
from dinov2.errors import ConfigError

_ROOT = Path(__file__).resolve().parents[2]  # of the project, or where the packages are installed
_FOLDERS = ("dinov2", "data_adapters", "eval", "run", "configs")
_SUFFIXES = (".py", ".yaml", ".yml")
_CONFIG_FILE = ("--config-file", "--config")
_DIGEST_CHARS = 12


def take_snapshot(folder: Path) -> Path:
    """Copy the Python and YAML files of the library, its datasets and its programs into a folder `code-<digest>`.

    Args:
        folder: in which it is made; the same code is copied once.

    Returns:
        The copy, to be first on PYTHONPATH.

    Raises:
        ConfigError: it cannot be written.
    """
    files = sorted(path for name in _FOLDERS for path in (_ROOT / name).rglob("*") if path.suffix in _SUFFIXES)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(_ROOT)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    target = folder.absolute() / f"code-{digest.hexdigest()[:_DIGEST_CHARS]}"
    try:
        if not target.is_dir():
            _copy(files, target)
    except OSError as error:
        raise ConfigError(f"--snapshot: {target} cannot be written ({error.strerror})") from error
    return target


def program_in(snapshot: Path, program: Path) -> Path:
    """Return the copy of a program, or the program itself if it is none of the project's."""
    program = program.resolve()
    copied = snapshot / program.relative_to(_ROOT) if program.is_relative_to(_ROOT) else program
    return copied if copied.is_file() else program


def with_own_config(arguments: Sequence[str], *, snapshot: Path) -> list[str]:
    """Copy the config file that a program's arguments name beside the code, and return arguments that name the copy."""
    changed = list(arguments)
    for place, text in enumerate(arguments):
        option, equals, value = text.partition("=")
        if option not in _CONFIG_FILE or (not equals and place + 1 == len(arguments)):
            continue
        source = Path(value if equals else arguments[place + 1]).expanduser()
        copied = _copy_config(source, snapshot.parent)
        changed[place + (not equals)] = f"{option}={copied}" if equals else str(copied)
    return changed


def _copy_config(source: Path, folder: Path) -> Path:
    """Copy a config file, together with what it is based on, under a name that its content gives."""
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        written = Path(unfinished) / source.name
        write_as_one_file(source, written)
        digest = hashlib.sha256(written.read_bytes()).hexdigest()[:_DIGEST_CHARS]
        return written.rename(folder / f"config-{digest}.yaml")


def _copy(files: Sequence[Path], target: Path) -> None:
    """Copy to another name, then rename: a folder of the final name is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    for path in files:
        copied = unfinished / path.relative_to(_ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    unfinished.chmod(0o755)
    try:
        os.rename(unfinished, target)
    except OSError:  # another launcher was faster
        if not target.is_dir():
            raise
        shutil.rmtree(unfinished)
