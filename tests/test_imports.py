"""The house keeps its floors: a folder imports only what it may, and importing has no effect."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOOR_1 = {"layers", "distributed", "configs", "checkpoint_format", "signals"}
FLOOR_2 = {"models", "loss", "data", "logging", "fsdp", "hub"}
EVERYTHING = FLOOR_1 | FLOOR_2 | {"train", "eval", "run", "data_adapters"}

# What a folder of dinov2/ (or a top-level one) may import of ours, besides itself and dinov2.errors.
MAY_IMPORT = {
    "dinov2": set(),
    "errors": set(),
    "signals": set(),
    "layers": set(),
    "distributed": set(),
    "configs": set(),
    "checkpoint_format": set(),
    "models": {"layers"},
    "loss": {"distributed"},
    "data": {"distributed", "configs"},
    "logging": {"distributed", "configs", "checkpoint_format"},
    "fsdp": {"distributed", "configs", "checkpoint_format"},
    "hub": {"models", "layers", "checkpoint_format"},
    "data_adapters": {"data"},
    "train": FLOOR_1 | FLOOR_2 | {"eval"},
    "eval": FLOOR_1 | FLOOR_2,
    "run": EVERYTHING,
    "programs": EVERYTHING,
}
TORCH_ALONE = {"layers", "checkpoint_format"}


def python_files() -> list[Path]:
    folders = ("dinov2", "data_adapters", "eval", "run")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 30
    return files


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """Name the row of the table that a module of ours belongs to."""
    first, *rest = module.split(".")
    if first == "data_adapters":
        return first
    if first in ("eval", "run"):
        return "programs"
    return rest[0] if rest else first


def imported_modules(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield the modules a file names in import statements; `from dinov2 import x` yields dinov2.x."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "dinov2" else (base,)


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("dinov2", "data_adapters")


def test_each_folder_imports_only_what_the_table_lists():
    wrong = []
    for path in python_files():
        here = unit(module_name(path))
        for module in filter(is_ours, imported_modules(path)):
            there = unit(module)
            if there not in {here, "errors"} | MAY_IMPORT[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}: {here} may not import {there}")
    assert not wrong, "\n".join(wrong)


def test_layers_and_the_checkpoint_format_need_torch_alone():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files()
        if unit(module_name(path)) in TORCH_ALONE
        for module in imported_modules(path, top_level_only=True)
        if not is_ours(module) and module.split(".")[0] not in sys.stdlib_module_names | {"torch"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import dinov2.eval.knn", "dinov2.eval.knn"),
        ("from dinov2 import run", "dinov2.run"),
        ("from ..run import submit", "dinov2.run"),
        ("def f():\n    from dinov2.train import train", "dinov2.train"),
    ],
)
def test_every_form_of_import_is_seen(tmp_path, monkeypatch, text, expected):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "dinov2" / "layers" / "mlp.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert list(imported_modules(path)) == [expected]
    assert unit(expected) not in MAY_IMPORT[unit(module_name(path))]


SHOW_EFFECTS = """
import builtins, importlib, json, logging, multiprocessing, os, random, sys, threading

outside, ours = json.loads(sys.argv[1])
for name in outside:
    importlib.import_module(name)

import numpy, PIL.Image, torch

def state():
    loggers = [logging.root, *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    return {
        "log handlers": [f"{log.name} {handler}" for log in loggers for handler in log.handlers],
        "log level": logging.root.level,
        "CUDA": torch.cuda.is_initialized(),
        "process group": torch.distributed.is_initialized(),
        "threads": (threading.active_count(), torch.get_num_threads(), torch.get_num_interop_threads()),
        "random numbers": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "backend flags": (
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        ),
        "torch defaults": (torch.get_default_dtype(), torch.is_grad_enabled()),
        "environment": dict(os.environ),
        "files": os.listdir(),
        "builtins": set(vars(builtins)),
        "largest image": PIL.Image.MAX_IMAGE_PIXELS,
        "start method": multiprocessing.get_start_method(allow_none=True),
    }

before = state()
for name in ours:
    importlib.import_module(name)
after = state()
changed = [name for name in before if before[name] != after[name]]
sys.exit(f"importing changes: {changed}" if changed else 0)
"""


def test_importing_has_no_effect(tmp_path):
    files = [path for path in python_files() if unit(module_name(path)) != "programs" and path.stem != "__main__"]
    outside = {name for path in files for name in imported_modules(path, top_level_only=True) if not is_ours(name)}
    ours = [module_name(path) for path in files]
    result = subprocess.run(
        [sys.executable, "-c", SHOW_EFFECTS, json.dumps([sorted(outside), ours])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""
