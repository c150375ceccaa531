"""Optional destinations of metrics: TensorBoard and Weights & Biases, imported where they are used."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from dinov2.errors import ConfigError


class Writer(Protocol):
    """A destination of metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoardWriter:
    """Write event files into `<output_dir>/tensorboard`.

    Args:
        output_dir: folder of the run.
        start_step: what an interrupted run wrote for this step and later ones is hidden.
    """

    def __init__(self, output_dir: Path, *, start_step: int) -> None:
        _require("tensorboard", key="logging.tensorboard")
        module = _require("torch.utils.tensorboard", key="logging.tensorboard", extra="tensorboard")
        purge_step = start_step if start_step else None
        self._writer = module.SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbWriter:
    """Send metrics to a Weights & Biases run; a resumed run goes on in the same one.

    Args:
        output_dir: folder of the run; the run's id is kept there in `wandb_run_id.txt`.
        project: project name there.
        config: settings shown there.
    """

    def __init__(self, output_dir: Path, *, project: str, config: Mapping[str, Any]) -> None:
        wandb = _require("wandb", key="logging.wandb")
        id_file = output_dir / "wandb_run_id.txt"
        run_id = id_file.read_text().strip() if id_file.is_file() else None
        try:
            self._run = wandb.init(project=project, dir=str(output_dir), config=dict(config), id=run_id, resume="allow")
        except wandb.Error as error:
            raise ConfigError(f"logging.wandb=true: W&B did not start ({error}); run `wandb login` first") from error
        id_file.write_text(f"{self._run.id}\n")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step."""
        self._run.log({"iteration": step, **values})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _require(module: str, *, key: str, extra: str | None = None) -> ModuleType:
    extra = extra or module
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key}=true needs the package {extra}; install it with: pip install 'dinov2-adapt[{extra}]'"
        ) from error
