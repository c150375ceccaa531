"""Write a backbone for other programs: official names, timm, Hugging Face, safetensors.

Everything is written under a temporary name beside the target and renamed when it is complete.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import CheckpointError, ConfigError
from dinov2.hub.architecture import Architecture
from dinov2.hub.formats import from_official, to_official
from dinov2.hub.report import format_count
from dinov2.hub.stored_tensor import State, StoredTensor
from dinov2.hub.weights import (
    MAY_BE_MISSING,
    choose_network,
    describe_backbone,
    explain_number_format,
    open_weights,
    refuse_non_finite,
    with_masks,
)
from dinov2.hub.write_weights import FILE_SUFFIXES, MODEL_FILES, write_file, write_folder
from dinov2.layers.rope import RopePositionEmbedding
from dinov2.models import build_model

FORMATS = ("dinov2", "timm", "hf", "safetensors")
_NAMES = {"dinov2": "official", "safetensors": "official", "timm": "timm's", "hf": "Hugging Face's"}
_FILE_FORMATS = {"dinov2": (".pth", ".pt"), "safetensors": (".safetensors",)}


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    names: str  # whose names it has
    num_tensors: int
    num_values: int
    load_with: str  # Python that reads it

    def __str__(self) -> str:
        """Give all in one line."""
        size = f"{self.num_tensors} tensors, {format_count(self.num_values)} values"
        return f"{self.path}: {self.names} names, {size}; load it with: {self.load_with}"


def export_weights(
    weights: str | Path,
    output: str | Path,
    *,
    target: str,
    checkpoint_key: str | None = None,
    num_heads: int | None = None,
    overwrite: bool = False,
) -> Export:
    """Read a backbone from anything that `open_weights` takes and write it in one of `FORMATS`.

    Args:
        weights: a path or name.
        output: a file; for "hf" a folder, for "timm" a folder or a file that ends in .pth or .safetensors.
        target: "dinov2" (official names, of `torch.save`), "safetensors" (the same names), "timm" or "hf".
        checkpoint_key: which network to take from a file that holds several; None: as for `plan_weights`.
        num_heads: attention heads, where neither a named size nor RoPE's periods tell.
        overwrite: replace what is there.

    Raises:
        CheckpointError: the weights cannot be read, are not a whole backbone or not finite, the format has no place
            for them, or the output cannot be written.
        ConfigError: the output exists, or is not of the format's kind.
    """
    output = Path(output).expanduser()
    _check_output(output, target=target, overwrite=overwrite)
    file = open_weights(weights)
    key = choose_network(file, checkpoint_key)
    converted = to_official(file.states[key], path=file.path, network=checkpoint_key)
    try:
        state = with_masks(converted)
        architecture = describe_backbone(file, converted)
        architecture = replace(architecture, num_heads=num_heads or architecture.num_heads)
        state = refuse_non_finite(_complete(state, architecture), path=file.path)
        config: dict[str, Any] = {}
        if target in ("timm", "hf"):
            state, config = from_official(state, target=target, architecture=architecture)
    except CheckpointError as error:
        prefix = f"{file.path}: "
        raise CheckpointError(prefix + str(error).removeprefix(prefix)) from error
    if output.suffix in FILE_SUFFIXES:
        metadata = {"format": "pt", "names": target, "source": Path(file.path).name}
        write_file(output, {"": state}, metadata=metadata)
    else:
        write_folder(output, state, config=config)
    num_values = sum(tensor.numel() for tensor in state.values())
    return Export(output, _NAMES[target], len(state), num_values, _load_with(output, target=target, config=config))


def _check_output(output: Path, *, target: str, overwrite: bool) -> None:
    if target not in FORMATS:
        raise ValueError(f"target={target}: must be one of {', '.join(FORMATS)}")
    is_file = output.suffix in FILE_SUFFIXES
    if target == "hf" and is_file:
        raise ConfigError(f"--output {output}: the format hf is a folder; leave out {output.suffix}")
    suffixes = _FILE_FORMATS.get(target)
    if suffixes and output.suffix not in suffixes:
        raise ConfigError(f"--output {output}: a file in the format {target} ends in {' or '.join(suffixes)}")
    is_empty_folder = output.is_dir() and not is_file and not any(output.iterdir())
    if is_empty_folder or not output.exists():
        return
    if not overwrite:
        raise ConfigError(f"--output {output}: exists; choose another, or pass --overwrite")
    if output.is_dir() == is_file:
        raise ConfigError(
            f"--output {output}: is a {'folder' if is_file else 'file'}, which is not overwritten by a "
            f"{'file' if is_file else 'folder'}; choose another"
        )
    others = [] if is_file else sorted({path.name for path in output.iterdir()} - MODEL_FILES)
    if others:
        raise ConfigError(
            f"--output {output}: holds more than an exported model ({others[0]}), which is not overwritten; "
            "choose another"
        )


def _load_with(output: Path, *, target: str, config: Mapping[str, Any]) -> str:
    """Write the Python that reads an export in its own library."""
    if target == "hf":
        return f'transformers.AutoModel.from_pretrained("{output}")'
    if target == "timm":
        if output.suffix not in FILE_SUFFIXES:
            return f'timm.create_model("local-dir:{output}", pretrained=True)'
        arguments = "".join(f", {name}={value!r}" for name, value in config["model_args"].items())
        return f'timm.create_model("{config["architecture"]}", num_classes=0, checkpoint_path="{output}"{arguments})'
    if target == "safetensors":
        return f'safetensors.torch.load_file("{output}")'
    return f'torch.load("{output}", weights_only=True)'


def _complete(state: State, architecture: Architecture) -> State:
    """Add constants that the source's library leaves out; refuse less than a whole backbone, and more.

    The order is the official one.
    """
    with torch.device("meta"):
        model = build_from_architecture(architecture)
    names = model.state_dict()
    missing = [name for name in names if name not in state and not MAY_BE_MISSING.fullmatch(name)]
    unknown = [name for name in state if name not in names]
    if missing or unknown:
        parts = [
            f"{what}: {len(found)} (first: {found[0]})"
            for what, found in (("missing", missing), ("unknown", unknown))
            if found
        ]
        raise CheckpointError(f"is not exactly a backbone of {len(names)} tensors; {', '.join(parts)}")
    if problem := explain_number_format(names, state):
        raise CheckpointError(problem)
    dtype = state[next(iter(state))].dtype
    complete = {}
    for name, tensor in names.items():
        if name in state:
            complete[name] = state[name]
        elif architecture.family != "dinov1":  # which has no mask token
            complete[name] = StoredTensor.of(_constant(name, tensor, architecture, dtype))
    return complete


def build_from_architecture(architecture: Architecture) -> torch.nn.Module:
    """Build a backbone with the names and shapes of an architecture; what shapes do not tell is as by default."""
    if architecture.family == "resnet":
        return build_model(architecture.arch, in_chans=architecture.in_chans)
    return build_model(
        architecture.arch or "vit_small",
        embed_dim=architecture.embed_dim,
        depth=architecture.depth,
        num_heads=architecture.num_heads or 1,
        mlp_ratio=architecture.ffn_ratio,
        img_size=architecture.image_size or architecture.patch_size,
        patch_size=architecture.patch_size,
        in_chans=architecture.in_chans,
        init_values=1e-5 if architecture.layerscale else None,
        ffn_layer=architecture.ffn_layer,
        qkv_bias=architecture.qkv_bias,
        proj_bias=architecture.proj_bias,
        ffn_bias=architecture.ffn_bias,
        num_register_tokens=architecture.num_registers,
        norm_layer=architecture.norm_layer,
        mask_k_bias=architecture.mask_k_bias,
        untie_cls_and_patch_norms=architecture.untie_cls_and_patch_norms,
        untie_global_and_local_cls_norm=architecture.untie_global_and_local_cls_norm,
        pos_embed_type="rope" if architecture.has_rope else "learned",
    )


def _constant(name: str, like: Tensor, architecture: Architecture, dtype: torch.dtype) -> Tensor:
    """Make a tensor that is the same in every model: RoPE's periods, the key's mask, or zeros."""
    if name == "rope_embed.periods":
        if architecture.num_heads is None:
            raise CheckpointError("its number of attention heads, which RoPE needs, is unknown; give --config-file")
        return RopePositionEmbedding(architecture.embed_dim, num_heads=architecture.num_heads).periods
    if name.endswith("bias_mask"):
        third = torch.ones(like.shape[0] // 3, dtype=dtype)
        return torch.cat([third, torch.zeros_like(third), third])
    return torch.zeros(like.shape, dtype=dtype if like.is_floating_point() else like.dtype)
