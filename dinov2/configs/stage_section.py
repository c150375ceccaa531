"""One stage of a run, as `stages` lists them: its name, and the settings that are its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage; made and checked by `read_stages`, completed to a whole `Config` by `stage_configs`."""

    name: str  # letters, digits, - and _
    keys: Mapping[str, Any] = field(hash=False)  # value by dotted key of ours; null for an optional section taken back
