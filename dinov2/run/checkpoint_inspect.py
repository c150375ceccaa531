"""What one checkpoint holds: its run, its settings, tensors by module, optimiser groups. No tensor is read."""

import json
import math
from collections.abc import Mapping
from typing import Any

from dinov2.checkpoint_format import StoredCheckpoint, StoredPieces
from dinov2.configs import load_config, to_dict
from dinov2.hub.report import format_count
from dinov2.run.checkpoint_files import flatten, format_bytes, format_columns, format_plural, read_settings

_MAX_ITEMS = 3  # of a list, shown on the screen
_SHOWN_ITSELF = ("iteration", "metrics")


def describe(stored: StoredCheckpoint, *, depth: int) -> dict[str, Any]:
    """Describe a checkpoint, for JSON.

    Args:
        stored: opened.
        depth: parts of a tensor's name that make its module, >= 1: 2 gives `teacher.backbone`.
    """
    manifest = stored.manifest
    settings = flatten(read_settings(stored.config))
    defaults = flatten(json.loads(json.dumps(to_dict(load_config(None)))))
    return {
        "path": str(stored.folder / stored.name),
        "iteration": manifest.iteration,
        "saved": manifest.time or None,
        "ranks": manifest.world_size,
        "strategy": manifest.sharding_strategy,
        "format_version": manifest.format_version,
        "global_batch_size": manifest.global_batch_size,
        "size_bytes": manifest.size_bytes,
        "versions": manifest.versions,
        "metrics": manifest.metrics,
        "extra": {key: value for key, value in stored.extra.items() if key not in _SHOWN_ITSELF},
        "config_digest": manifest.config_digest or None,
        "config": settings,
        "changed_settings": {key: v for key, v in settings.items() if key not in defaults or defaults[key] != v},
        "modules": _by_module(stored.model, depth=depth),
        "optimizers": {key: group for key in stored.checkpointable_names if (group := _optimizer(stored, key))},
        "per_rank": sorted(stored.rank_values(0)),
    }


def format_description(found: Mapping[str, Any]) -> str:
    """Lay a description out for the screen."""
    rows = {
        "checkpoint": found["path"],
        "iteration": f"{found['iteration']}, training goes on with {found['iteration'] + 1}",
        "saved": found["saved"],
        "by": f"{format_plural(found['ranks'], 'process')}, {found['strategy']}".replace("processs", "processes"),
        "global batch": found["global_batch_size"] and f"{found['global_batch_size']} images",
        "size": f"{format_bytes(found['size_bytes'])}, format version {found['format_version']}",
        "versions": _join(found["versions"]),
        "metrics": _join(found["metrics"]),
        "also": _join(found["extra"]),
        "kept per rank": ", ".join(found["per_rank"]),
        "settings": f"{len(found['config'])}, {len(found['changed_settings'])} of them not the defaults",
    }
    lines = [format_columns([[name, str(value)] for name, value in rows.items() if value])]
    lines += [f"  {key}={json.dumps(value)}" for key, value in found["changed_settings"].items()]
    lines += ["", format_columns([["module", "tensors", "values", "bytes"], *map(_cells, found["modules"].items())])]
    for key, optimizer in found["optimizers"].items():
        lines += ["", f"{key}: {_join(optimizer['settings'])}"]
        rows = [["group", "parameters", "values", "state", "settings of its own"]]
        for number, group in enumerate(optimizer["groups"]):
            counts = [str(group["parameters"]), format_count(group["values"]), format_bytes(group["state_bytes"])]
            rows.append([str(number), *counts, _join(group["settings"])])
        lines.append(format_columns(rows))
    return "\n".join(lines)


def _join(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > _MAX_ITEMS:
        return f"{value[0]}... ({len(value)})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _by_module(tensors: Mapping[str, StoredPieces], *, depth: int) -> dict[str, dict[str, int]]:
    """Count tensors, values and bytes by the first parts of their names."""
    modules: dict[str, dict[str, int]] = {}
    for name, tensor in tensors.items():
        module = ".".join(name.split(".")[:depth])
        counts = modules.setdefault(module, {"tensors": 0, "values": 0, "bytes": 0})
        counts["tensors"] += 1
        counts["values"] += math.prod(tensor.global_shape)
        counts["bytes"] += num_bytes(tensor)
    return modules


def num_bytes(tensor: StoredPieces) -> int:
    """Count the bytes of a whole tensor."""
    return math.prod(tensor.global_shape) * tensor.dtype.itemsize


def _cells(item: tuple[str, Mapping[str, int]]) -> list[str]:
    name, counts = item
    return [name, str(counts["tensors"]), format_count(counts["values"]), format_bytes(counts["bytes"])]


def _optimizer(stored: StoredCheckpoint, key: str) -> dict[str, Any] | None:
    """Describe an optimiser's groups; settings that all groups share stand apart."""
    saved = stored.optimizer_state(key)
    if not saved:
        return None
    groups = [{name: v for name, v in group.items() if name != "params"} for group in saved["param_groups"]]
    shared = {
        name: value
        for name, value in (groups[0] if groups else {}).items()
        if all(name in group and group[name] == value for group in groups)
    }
    described = []
    for group, settings in zip(saved["param_groups"], groups, strict=True):
        states = [saved["state"].get(name, {}) for name in group["params"]]
        tensors = [value for state in states for value in state.values() if isinstance(value, StoredPieces)]
        described.append(
            {
                "parameters": len(group["params"]),
                "values": sum(math.prod(stored.model[n].global_shape) for n in group["params"] if n in stored.model),
                "state_bytes": sum(map(num_bytes, tensors)),
                "settings": {name: value for name, value in settings.items() if name not in shared},
            }
        )
    return {"settings": shared, "groups": described}
