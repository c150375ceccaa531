"""Give the tensors of a backbone their official names, whichever library named them, and the other way.

Nothing is read here: names and shapes are planned, and each result says how to make its values when they are wanted.

Recognised, under any prefix (`module.`, `backbone.`, `teacher.`, `encoder.`, ...) and with blocks in chunks:
Meta's DINO, DINOv2 and DINOv3, timm, Hugging Face, torchvision's ResNets.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import Architecture
from dinov2.hub.formats_huggingface import HF_DINOV2, HF_DINOV3, HF_VIT, to_huggingface
from dinov2.hub.formats_naming import Naming, Place, concatenate, constant
from dinov2.hub.formats_normalise import is_packed, normalise
from dinov2.hub.formats_official import OFFICIAL, RESNET
from dinov2.hub.formats_timm import TIMM_DINOV2, TIMM_DINOV3, to_timm
from dinov2.hub.stored_tensor import State, StoredTensor

__all__ = ["Converted", "another_network", "from_official", "to_official"]

NAMINGS = (OFFICIAL, TIMM_DINOV2, TIMM_DINOV3, HF_DINOV2, HF_DINOV3, HF_VIT, RESNET)
KNOWN = "DINO, DINOv2 and DINOv3 of Meta, timm or Hugging Face, torchvision ResNet"

# Modules that wrap another one add their name anywhere: DistributedDataParallel, torch.compile, FSDP, recomputation.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_HEAD = re.compile(r"^(?P<prefix>(?:.*\.)?)(?P<head>dino_head|ibot_head|head(?=\.(?:mlp|last_layer)\.))\.(?P<rest>.+)$")
_CLASSIFIERS = re.compile(r"^(?:head|fc|classifier|pooler)(?:\.|$)")
_NETWORKS = ("teacher", "student")
# Blocks alone are no evidence: language models share Hugging Face's names of them.
_TRUNK = ("cls_token", "patch_embed.proj.weight", "conv1.weight")
_WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A file's tensors under official names."""

    state: State  # the backbone; names that it does not know keep theirs, for the comparison with the model
    heads: dict[str, State]  # "dino_head", "ibot_head": names inside the head
    naming: str  # whose names they were, for people
    converted: tuple[str, ...]  # official names of tensors that were renamed, joined, split or reshaped
    unused: tuple[str, ...]  # names in the file that are neither backbone nor heads
    implied: State = field(default_factory=dict)  # constants that the library leaves out; for models that have them


def to_official(state: State, *, path: str | Path, network: str | None = None) -> Converted:
    """Recognise the naming and plan the backbone and the heads under official names.

    Args:
        state: names and tensors of the file; left unchanged.
        path: for error sentences.
        network: which one to take where the names hold several (`teacher.backbone.*`, `student.backbone.*`); None: the
            teacher, or the student of a file without one.

    Raises:
        CheckpointError: the names are unknown, or there are only heads, or another network, or half a tensor.
    """
    names = {_WRAPPERS.sub("", name): name for name in state}
    naming, prefix = _recognise(names, path=path, network=network)
    places: dict[str, Place] = {}
    heads: dict[str, State] = {}
    strays: State = {}
    unused = []
    for name, source in names.items():
        inner = name.removeprefix(prefix) if name.startswith(prefix) else None
        if inner is not None and (place := naming.find(inner)):
            places[source] = place
        elif in_head := _head(name, prefix):
            heads.setdefault(in_head[0], {})[in_head[1]] = state[source]
        elif inner is not None and (stray := _stray(naming, inner)):
            strays[stray] = state[source]
        else:
            unused.append(source)
    official, without_keys = _join(places, state, path=path)
    changed = {place.official for place in places.values() if place.is_renamed}
    title = _title(naming, official)
    changed |= normalise(official)
    return Converted(
        state=official | strays,
        heads=heads,
        naming=title,
        converted=tuple(name for name in official if name in changed),
        unused=tuple(unused),
        implied=_implied(naming, official, without_keys),
    )


def _recognise(names: Iterable[str], *, path: str | Path, network: str | None) -> tuple[Naming, str]:
    """Find the naming and the prefix that account for the most tensors."""
    counts: Counter[tuple[int, str]] = Counter()
    has_trunk = set()
    for name in names:
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            for number, naming in enumerate(NAMINGS):
                if place := naming.find(name[start:]):
                    counts[number, name[:start]] += 1
                    if naming is OFFICIAL or place.official in _TRUNK:
                        has_trunk.add((number, name[:start]))
    candidates = {key: count for key, count in counts.items() if key in has_trunk and count > 2}
    if not candidates:
        raise CheckpointError(_unknown(names, path))
    networks = {part for _, prefix in candidates for part in prefix.split(".") if part in _NETWORKS}
    if networks:
        wanted = network if network in _NETWORKS else _NETWORKS[0]
        if wanted not in networks:
            other = networks.pop()
            if network is not None:
                raise CheckpointError(another_network(path, wanted, other))
            wanted = other
        candidates = {key: count for key, count in candidates.items() if wanted in key[1].split(".")}
    number, prefix = min(candidates, key=lambda key: (-candidates[key], key[0], len(key[1])))
    return NAMINGS[number], prefix


def another_network(path: str | Path, wanted: str, other: str) -> str:
    """Say that a file holds another network than the one asked for."""
    return f"{path}: has no '{wanted}' but has '{other}'; take that one with --checkpoint-key {other}"


def _unknown(names: Iterable[str], path: str | Path) -> str:
    heads = dict.fromkeys(match["head"] for name in names if (match := _HEAD.match(name)))
    if heads:
        return (
            f"{path}: holds only heads ({', '.join(heads)}) and no backbone; "
            "give the file that holds the backbone, as a teacher_checkpoint.pth does"
        )
    first = ", ".join(list(names)[:3])
    return f"{path}: no backbone is recognised in its tensor names (first: {first}); known are {KNOWN}"


def _head(name: str, prefix: str) -> tuple[str, str] | None:
    """Return the head and the name inside it of a tensor of a head that stands beside the backbone."""
    match = _HEAD.match(name)
    if match is None or match["prefix"] != prefix.removesuffix("backbone."):
        return None
    head = "dino_head" if match["head"] == "head" else match["head"]  # DINO's own files
    rest = match["rest"]
    for parametrised, plain in _WEIGHT_NORM.items():
        rest = rest.replace(parametrised, plain)
    return head, rest


def _stray(naming: Naming, name: str) -> str | None:
    """Return the name of an unknown tensor in the middle of the backbone, None where it may be left unused."""
    if _CLASSIFIERS.match(name):
        return None
    return naming.stray(name) or name


def _join(places: dict[str, Place], state: State, *, path: str | Path) -> tuple[State, set[str]]:
    """Put the parts of each official tensor together; missing parts of a bias are zeros, and those biases are named."""
    found: dict[str, dict[int, str]] = {}
    spellings = {}
    for source, place in places.items():
        parts = found.setdefault(place.official, {})
        if place.part in parts:
            raise CheckpointError(f"{path}: both {parts[place.part]} and {source} would be {place.official}")
        parts[place.part] = source
        spellings[place.official] = place.spelling
    official: State = {}
    completed = set()
    for name, sources in found.items():
        spelling = spellings[name]
        first = state[next(iter(sources.values()))]
        values = []
        for part, spelled in enumerate(spelling):
            if part in sources:
                values.append(state[sources[part]])
            elif name.endswith(".bias"):
                completed.add(name)
                values.append(constant(0, first.shape, first.dtype))
            else:
                raise CheckpointError(
                    f"{path}: has {next(iter(sources.values()))} but no {spelled} beside it, which together are {name}"
                )
        official[name] = values[0] if len(values) == 1 else concatenate(values)
    return official, completed


def _title(naming: Naming, state: State) -> str:
    if naming is OFFICIAL:
        if "pos_embed" not in state:
            return "DINOv3"
        if is_packed(state, "blocks.0.mlp."):
            return TIMM_DINOV2.title
        has_more = {"mask_token", "register_tokens", "blocks.0.ls1.gamma"} & state.keys()
        return naming.title if has_more else "DINO"
    if naming is HF_DINOV2 and "register_tokens" in state:
        return "Hugging Face Dinov2WithRegisters"
    return naming.title


def _implied(naming: Naming, state: State, without_keys: set[str]) -> State:
    """Make what a library leaves out of DINOv3 because it is constant; the loader takes it where the model has it."""
    if naming not in (TIMM_DINOV3, HF_DINOV3):
        return {}
    implied: State = {}
    for name, weight in state.items():
        bias = name.removesuffix("weight") + "bias"
        if not name.endswith("attn.qkv.weight"):
            continue
        if bias not in state:
            implied[bias] = constant(0, weight.shape[:1], weight.dtype)
        if bias not in state or bias in without_keys:
            implied[f"{bias}_mask"] = _bias_mask(weight)
    return implied


def _bias_mask(weight: StoredTensor) -> StoredTensor:
    third = (weight.shape[0] // 3,)
    return concatenate([constant(value, third, weight.dtype) for value in (1, 0, 1)])


def from_official(state: State, *, target: str, architecture: Architecture) -> tuple[State, dict[str, Any]]:
    """Plan a backbone under another library's names, complete for strict loading there.

    Parts that the library always has and this backbone lacks get neutral values (biases of zero, LayerScale of one).
    Buffers, the mask token where the library has none and the norm of local crops, which only training uses, are left
    out. Positions of DINOv2 without registers are interpolated by other rules there: features agree at the size of its
    positions. DINOv3 is taken to have the official coordinates ("separate") and norms (eps 1e-5).

    Args:
        state: official names of a whole backbone; left unchanged.
        target: "timm" or "hf".
        architecture: of the backbone; `num_heads` known.

    Returns:
        (state dict, settings): for "timm" the content of its config.json, `architecture` for `timm.create_model` and
        its keywords `model_args`; for "hf" the content of config.json.

    Raises:
        CheckpointError: the library cannot hold this backbone; a sentence without the file's name.
    """
    library = {"timm": "timm", "hf": "Hugging Face"}[target]
    if architecture.family == "resnet":
        if target == "hf":
            raise CheckpointError("is a ResNet, for which Hugging Face has other names; export it as timm or dinov2")
        return to_timm(state, architecture)
    if architecture.num_heads is None:
        raise CheckpointError(
            f"its number of attention heads does not show in its tensors at a width of {architecture.embed_dim}; "
            "give --config-file"
        )
    if "norm.bias" not in state or "cls_norm.weight" in state:
        what = "RMSNorm" if "norm.bias" not in state else "a norm of its own for the class token"
        raise CheckpointError(f"has {what}, which {library}'s models do not have; export it as dinov2")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("local_cls_norm.")}
    return to_timm(state, architecture) if target == "timm" else to_huggingface(state, architecture)
