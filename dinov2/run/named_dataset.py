"""Datasets as the programs that look at data open them: as training does, and with an eye on where results go."""

import os
from pathlib import Path
from typing import Any

from dinov2.configs import Config
from dinov2.data import make_dataset
from dinov2.errors import ConfigError


def choose_name(option: str | None, cfg: Config) -> str:
    """Dataset string of the option --dataset or, without it, of the config.

    Raises:
        ConfigError: there is none.
    """
    name = option or cfg.train.dataset_path
    if not name:
        raise ConfigError("--dataset is not given; name the images, e.g. ImageFolder:root=photos")
    return name


def open_dataset(name: str, cfg: Config) -> Any:
    """Open a dataset with the settings of a run.

    Raises:
        ConfigError: the string is wrong.
        DatasetError: files are missing.
    """
    return make_dataset(
        name,
        channels=cfg.student.in_chans,
        cache_dir=cfg.data.cache_dir or str(Path(cfg.train.output_dir) / "cache"),
        max_image_pixels=cfg.data.max_image_pixels,
    )


def require_outside(dataset: Any, folder: Path, *, option: str) -> None:
    """Check that a picture does not go into a folder whose pictures are all taken for data.

    Args:
        dataset: any, also a mixture.
        folder: where the picture goes.
        option: that says so, for the error.

    Raises:
        ConfigError: it does.
    """
    for part in getattr(dataset, "parts", [dataset]):
        if not getattr(part, "scans_folder", False):
            continue
        root, real = os.path.realpath(part.root), os.path.realpath(folder)
        if os.path.commonpath((root, real)) == root:
            raise ConfigError(
                f"{option} {folder} lies in the dataset's folder {part.root}, where the picture would become one of "
                "its images; choose a folder outside"
            )
