"""Config files: YAML, and with `base: other.yaml` only what differs from another file.

A base is looked for beside the file that names it, and may have a base itself. Its keys hold where the file does not
set them; a list, such as `stages`, is replaced as a whole.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dinov2.configs.known_keys import flatten
from dinov2.errors import ConfigError

_BASE = "base"


class Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number and 2024-01-31 is text; of a key given twice, the last wins."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_FLOAT = r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))|\.nan"
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^({_FLOAT})$"), list("-+.0123456789"))


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read a file and its bases; returns values by dotted key, as they are written.

    Raises:
        ConfigError: a file cannot be read, names an unknown key, or is a base of itself.
    """
    return _read(str(path), above=())


def write_as_one_file(path: Path, target: Path) -> None:
    """Write what a file and its bases say together to one file; a file without a base is copied as it stands.

    Raises:
        ConfigError: as `read_config_file`.
        OSError: the target cannot be written.
    """
    if _BASE in _read_yaml(str(path)):
        target.write_text(yaml.safe_dump(read_config_file(path), sort_keys=False), encoding="utf-8")
    else:
        target.write_bytes(path.read_bytes())


def _read(path: str, *, above: tuple[Path, ...]) -> dict[str, Any]:
    content = dict(_read_yaml(path, named_by=above[-1] if above else None))
    base = content.pop(_BASE, None)
    own = dict(flatten(content, source=f"in {path}"))
    if base is None:
        return own
    place = Path(path).resolve()
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base={base!r} must be the path of another config file, e.g. adapt_small_data.yaml")
    if place in above:
        raise ConfigError(f"{path}: is a base of itself; take out one `base:`")
    return _read(str(Path(path).parent / base), above=(*above, place)) | own


def _read_yaml(path: str, *, named_by: Path | None = None) -> Mapping[str, Any]:
    """Return the mapping a YAML file holds; an empty file is an empty mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        why = "" if named_by is None else f", which {named_by.name} names as its base; copy it there or give its path"
        raise ConfigError(f"{path}: no such config file{why}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a config file ({error.strerror})") from None
    try:
        content = yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: is not valid YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections with keys such as 'train: {{seed: 0}}', not {_kind(content)}")
    return content


def _kind(content: Any) -> str:
    return "a list" if isinstance(content, list) else "a single value"
