"""Open a published model by its name in timm or on the Hugging Face hub.

Only files of weights and `config.json` are downloaded, into the cache of `huggingface_hub`, and opened like any other
file: no model is built and no code of the model's authors runs. Safetensors are preferred.
"""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from dinov2.errors import CheckpointError
from dinov2.hub.open_folder import holds_model, open_folder
from dinov2.hub.weights_file import WeightsFile

# The published models of the DINO family on the hub, for the nearest name to a wrong one.
PUBLISHED = (
    *(f"facebook/dino-vit{size}{patch}" for size in "sb" for patch in (16, 8)),
    *(f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")),
    *(f"facebook/dinov2-with-registers-{size}" for size in ("small", "base", "large", "giant")),
    *(
        f"facebook/dinov3-{arch}-pretrain-lvd1689m"
        for arch in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")
    ),
    *(f"facebook/dinov3-{arch}-pretrain-sat493m" for arch in ("vitl16", "vit7b16")),
)
_SAFETENSORS = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_BIN = ["config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def open_timm(name: str) -> WeightsFile:
    """Open the weights that timm has for a model.

    Args:
        name: as in `timm.create_model`, with the tag of the weights (`.lvd142m`) or without, for timm's default.

    Raises:
        CheckpointError: timm or the model is not there, or cannot be downloaded.
    """
    given = f"timm:{name}"
    models = _import("timm", given).models
    name = models.get_deprecated_models().get(name) or name
    try:
        source = models.get_pretrained_cfg(name)
    except RuntimeError as error:  # the model has no weights with this tag
        raise _unknown_to_timm(models, name, given) from error
    if source is None:
        raise _unknown_to_timm(models, name, given)
    if not source.has_weights:
        raise CheckpointError(f"{given}: timm has this model but no weights for it")
    if not source.hf_hub_id:
        raise CheckpointError(f"{given}: timm takes these weights from {source.url}; download that file, give its path")
    return replace(_download(source.hf_hub_id, given), path=given, kind="timm model", config=None)


def open_huggingface(name: str) -> WeightsFile:
    """Open a model of the Hugging Face hub, or a folder with one.

    Args:
        name: `organisation/model`, or the path of a folder.

    Raises:
        CheckpointError: there is no such model, or it cannot be downloaded.
    """
    given = f"hf:{name}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return replace(open_folder(folder), path=given)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{given}: is neither a folder nor a name as in hf:facebook/dinov2-small")
    return replace(_download(name, given), path=given, kind="Hugging Face model")


def _download(repo: str, given: str) -> WeightsFile:
    """Get the files of a model into the hub's cache, or find them there, and open them."""
    hub, errors = _import("huggingface_hub", given), _import("huggingface_hub.errors", given)
    for patterns in (_SAFETENSORS, _BIN):
        try:
            folder = Path(hub.snapshot_download(repo, allow_patterns=patterns))
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{given}: is given out to those who accept its licence; do so at https://huggingface.co/{repo}, "
                "then log in with: hf auth login"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{given}: Hugging Face has no model '{repo}'{_nearest_published(repo)}; "
                "if it is a private one, log in with: hf auth login"
            ) from error
        except errors.HFValidationError as error:
            raise CheckpointError(f"{given}: is not a possible name of a model ({_first_line(error)})") from error
        except Exception as error:  # of several libraries for the network, which differ with its version
            raise CheckpointError(
                f"{given}: cannot be downloaded ({_first_line(error)}){_nearest_published(repo)}; check the network, "
                "or copy the model folder here from elsewhere and give its path"
            ) from error
        if holds_model(folder):
            return open_folder(folder)
    raise CheckpointError(f"{given}: '{repo}' holds neither model.safetensors nor pytorch_model.bin")


def _import(package: str, given: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise CheckpointError(
            f"{given}: needs the package {name}, which is not installed; run: pip install {name}"
        ) from error


def _unknown_to_timm(models: ModuleType, name: str, given: str) -> CheckpointError:
    """Offer the nearest name: of the weights of this model, or else of another model, with its default weights."""
    full_names = models.list_pretrained()
    model = name.partition(".")[0]
    tags = [full for full in full_names if full.partition(".")[0] == model]
    nearest = _nearest(name, tags) or next(iter(tags), None)
    if nearest is None and (other := _nearest(model, {full.partition(".")[0] for full in full_names})):
        nearest = f"{other}.{models.get_pretrained_cfg(other).tag}"
    return CheckpointError(f"{given}: timm has no model '{name}'" + (f"; nearest: {nearest}" if nearest else ""))


def _nearest_published(name: str) -> str:
    nearest = None if name in PUBLISHED else _nearest(name, PUBLISHED)
    return f"; nearest: {nearest}" if nearest else ""


def _nearest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.7)), None)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
