"""Open weights, whatever they are kept in: a file, a folder, a checkpoint of a run, or the name of a published model.

Opening reads names, shapes and types; the tensors are read one by one when they are used (`StoredTensor.read`), as
views of files where the format allows it. Nothing in a file is ever executed.
"""

from pathlib import Path

from dinov2.checkpoint_format import is_checkpoint_path
from dinov2.errors import CheckpointError
from dinov2.hub.open_checkpoint import open_checkpoint
from dinov2.hub.open_file import open_file
from dinov2.hub.open_folder import INDEX_SUFFIX, open_folder, open_index
from dinov2.hub.open_named import open_huggingface, open_timm
from dinov2.hub.weights_file import WeightsFile

_NAMED = {"timm:": open_timm, "hf:": open_huggingface}


def open_weights(path: str | Path) -> WeightsFile:
    """Open weights for loading.

    Args:
        path: one of
            a file of `torch.save` (`.pth`, `.pt`, `.bin`) or of safetensors;
            the index of a model in several files (`model.safetensors.index.json`);
            a model folder of Hugging Face or timm;
            a checkpoint of a training run: a rank file, the pattern `model_0003749.rank_{rank}.pth`, the manifest, or
            `folder/model_0003749`;
            `timm:<name>` or `hf:<organisation>/<name>`, which is downloaded by the library of that name, or
            `hf:<folder>`.

    Raises:
        CheckpointError: there are no weights there that can be read; the sentence says why and what to do.
    """
    name = str(path)
    for prefix, open_named in _NAMED.items():
        if name.startswith(prefix):
            return open_named(name.removeprefix(prefix))
    if name.startswith(("http://", "https://")):
        raise CheckpointError(f"{name}: is a web address; download the file and give its path")
    try:
        return _open_path(Path(path).expanduser())
    except OSError as error:  # a folder that may not be entered, a name that no file can have
        raise CheckpointError(f"{name}: cannot be read ({error.strerror})") from error


def _open_path(path: Path) -> WeightsFile:
    if path.is_dir():
        return open_folder(path)
    if is_checkpoint_path(path):
        return open_checkpoint(path)
    return open_index(path) if path.name.endswith(INDEX_SUFFIX) else open_file(path)
