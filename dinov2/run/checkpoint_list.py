"""The checkpoints in the folder of a run: which there are, whether they are complete, what is kept and why."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dinov2 import checkpoint_format as files
from dinov2.errors import CheckpointError
from dinov2.fsdp.periodic import BEST_NAME
from dinov2.run.checkpoint_files import flatten, format_bytes, format_columns, format_plural, read_settings

_HEADER = ["checkpoint", "iteration", "saved (UTC)", "ranks", "strategy", "size", "state"]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint of a folder."""

    name: str
    iteration: int
    saved: str  # ISO 8601 in UTC, to the second
    ranks: int | None  # None where it is not known
    strategy: str | None
    size_bytes: int
    state: str  # complete, damaged or incomplete
    problem: str | None = None
    marks: tuple[str, ...] = ()  # best, kept, newest

    def cells(self) -> list[str]:
        """Give the cells of the table."""
        state = ", ".join((self.state, *self.marks)) + (f": {self.problem}" if self.problem else "")
        ranks, strategy = str(self.ranks or "?"), self.strategy or "?"
        size = format_bytes(self.size_bytes)
        return [self.name, str(self.iteration), self.saved.replace("T", " "), ranks, strategy, size, state]


def list_checkpoints(folder: Path) -> list[Listed]:
    """Describe the checkpoints of a folder, oldest first; sizes are compared with the manifests, contents are not.

    Raises:
        CheckpointError: it is no folder, or holds none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder; give the folder of a run")
    names = {
        files.split_path(path.name.removesuffix(".tmp"))[1]
        for pattern in ("model_*.rank_*.pth", "model_*.rank_*.pth.tmp", "model_*.manifest.json")
        for path in folder.glob(pattern)
    }
    names = {name for name in names if files.is_checkpoint_path(name)}
    if not names:
        raise CheckpointError(f"{folder}: holds no checkpoint of a training run")
    listed = [_describe(folder, name) for name in sorted(names, key=files.iteration_of)]
    return _with_marks(folder, listed)


def format_list(listed: list[Listed], *, as_json: bool) -> str:
    """Lay a list of checkpoints out as a table, or as a JSON list."""
    if as_json:
        return json.dumps([asdict(one) for one in listed], indent=2)
    return format_columns([_HEADER, *(one.cells() for one in listed)])


def _describe(folder: Path, name: str) -> Listed:
    paths = [path for path in folder.glob(f"{name}.*") if path.is_file()]
    newest_s = max((path.stat().st_mtime for path in paths), default=0.0)
    saved = datetime.fromtimestamp(newest_s, UTC).isoformat(timespec="seconds")
    common = {
        "name": name,
        "iteration": files.iteration_of(name),
        "size_bytes": sum(path.stat().st_size for path in paths),
    }
    if not files.has_manifest(folder, name):
        found = format_plural(sum(path.suffix == ".pth" for path in paths), "rank file")
        problem = f"{found} but no manifest, which is written last"
        return Listed(**common, saved=_short(saved), ranks=None, strategy=None, state="incomplete", problem=problem)
    try:
        manifest = files.open_checkpoint(folder, name)
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{name}: ")
        return Listed(**common, saved=_short(saved), ranks=None, strategy=None, state="damaged", problem=problem)
    return Listed(
        **common,
        saved=_short(manifest.time or saved),
        ranks=manifest.world_size,
        strategy=manifest.sharding_strategy,
        state="complete",
    )


def _short(time: str) -> str:
    """Cut a time to seconds, without its zone."""
    return time[: len("2026-01-31T23:59:59")]


def _with_marks(folder: Path, listed: list[Listed]) -> list[Listed]:
    complete = [one.name for one in listed if one.state == "complete"]
    if not complete:
        return listed
    best, keep_every = _read_best(folder), _keep_every(folder, complete[-1])
    marked = []
    for one in listed:
        is_kept = keep_every is not None and (one.iteration + 1) % keep_every == 0
        marks = {
            f"best ({best.get('metric')}={best.get('value')})": one.name == best.get("name"),
            "kept": is_kept and one.state == "complete",
            "newest": one.name == complete[-1],
        }
        marked.append(Listed(**asdict(one) | {"marks": tuple(mark for mark, holds in marks.items() if holds)}))
    return marked


def _read_best(folder: Path) -> dict[str, object]:
    try:
        best = json.loads((folder / BEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return best if isinstance(best, dict) else {}


def _keep_every(folder: Path, name: str) -> int | None:
    """Return `checkpointing.keep_every` of the run, as its newest checkpoint has it."""
    try:
        values = files.read_rank_index(folder, files.open_checkpoint(folder, name), 0).values
    except CheckpointError:
        return None
    return flatten(read_settings(values.get("config", ""))).get("checkpointing.keep_every")
