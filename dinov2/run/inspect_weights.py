"""Say what a file of weights is, which settings it needs, and whether it fits a config. Nothing in it is executed.

    python run/inspect_weights.py W [--config-file F] [--checkpoint-key KEY] [--json] [key=value ...]

Only names and shapes are read, so that this takes seconds for any size. With a config, or keys, the file is planned
into that config's backbone as `student.pretrained_weights` would be.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from dinov2.configs import Config, load_config
from dinov2.errors import CheckpointError
from dinov2.eval.build import build_backbone
from dinov2.hub.architecture import (
    Architecture,
    describe_head,
    format_settings,
)
from dinov2.hub.formats import Converted, to_official
from dinov2.hub.report import LoadReport, format_count, list_names
from dinov2.hub.weights import choose_network, describe_backbone, open_weights, plan_weights
from dinov2.hub.weights_file import WeightsFile
from dinov2.logging import run_program

_GATED = {"swiglu", "swiglufused", "swiglu32", "swiglu64", "swiglu128"}  # one set of tensors, if the width is the same


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect as the command line says; returns the exit code (0 fits or no config, 1 does not, 2 bad usage)."""
    return run_program(_run, argv)


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(
        prog="inspect_weights.py",
        description="What a file of weights is, which settings it needs, and whether it fits a config.",
    )
    parser.add_argument(
        "weights",
        metavar="W",
        help="file (.pth, .pt, .bin, .safetensors), model folder, checkpoint of a run, timm:<name> or hf:<name>",
    )
    parser.add_argument(
        "--config-file",
        "--config",
        metavar="F",
        help="YAML file whose backbone is to take the weights; default: none, the weights are described only",
    )
    parser.add_argument(
        "--checkpoint-key",
        metavar="KEY",
        help="network to take from a file that holds several, teacher or student; default: teacher, or the student "
        "of a file without one",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; default: a table")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config keys over the file")
    return parser


def _run(argv: Sequence[str] | None) -> int:
    args = get_args_parser().parse_intermixed_args(argv)
    has_config = bool(args.config_file or args.opts)
    cfg = load_config(args.config_file, args.opts)
    file = open_weights(args.weights)
    key = choose_network(file, args.checkpoint_key)
    converted = to_official(file.states[key], path=file.path, network=args.checkpoint_key)
    found = describe_file(file, converted, key=key)
    try:
        found |= _describe_network(describe_backbone(file, converted), converted, cfg)
    except CheckpointError as error:  # part of a backbone
        found["not_whole"] = str(error)
    problem = None
    if has_config:
        report, problem = _fit(file, cfg, checkpoint_key=args.checkpoint_key)
        found["config"] = args.config_file
        found["fits"] = problem is None
        found["problem"] = problem
        found["load"] = None if report is None else asdict(report)
    print(json.dumps(found, indent=2) if args.json else format_table(found))
    if problem:
        raise CheckpointError(problem)
    return 0


def _fit(file: WeightsFile, cfg: Config, *, checkpoint_key: str | None) -> tuple[LoadReport | None, str | None]:
    """Plan the file into the config's backbone; returns the report, or the sentence why it does not fit."""
    with torch.device("meta"):
        model = build_backbone(cfg)
    try:
        plan = plan_weights(model, file, checkpoint_key=checkpoint_key, allow_partial=cfg.student.allow_partial_weights)
    except CheckpointError as error:
        return None, str(error)
    return plan.report, None


def describe_file(file: WeightsFile, converted: Converted, *, key: str) -> dict[str, Any]:
    """Describe what was found in a file, for JSON."""
    heads = {name: describe_head(state) for name, state in converted.heads.items()}
    return {
        "path": file.path,
        "kind": file.kind,
        "networks": {name: len(state) for name, state in file.states.items()},
        "network": key or None,
        "other_entries": list(file.extra_keys),
        "names": converted.naming,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in converted.state.values()}),
        "heads": {name: None if head is None else asdict(head) for name, head in heads.items()},
        "converted": list(converted.converted),
        "unused": list(converted.unused),
    }


def _describe_network(architecture: Architecture, converted: Converted, cfg: Config) -> dict[str, Any]:
    settings = architecture.settings()
    if architecture.has_rope:
        settings["student.pos_embed_rope_dtype"] = _rope_dtype(converted)
    return {
        "architecture": asdict(architecture) | {"image_size": architecture.image_size},
        "settings": settings,
        "differing_settings": {key: value for key, value in settings.items() if not _is_set(cfg, key, value)}
        | _numbers_to_take_back(architecture, cfg, settings)
        | _crops_in_whole_patches(architecture, cfg),
    }


def _rope_dtype(converted: Converted) -> str:
    """Read the type of RoPE from its periods; float32, as in all released models, where they do not tell."""
    periods = converted.state.get("rope_embed.periods")
    if periods is None or periods.dtype == converted.state["patch_embed.proj.weight"].dtype:
        return "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(periods.dtype, "fp32")


def _crops_in_whole_patches(architecture: Architecture, cfg: Config) -> dict[str, int]:
    """Round crops up that a config with the file's patch size would refuse."""
    if architecture.family == "resnet":
        return {}
    patch = architecture.patch_size
    sizes = {name: getattr(cfg.crops, name) for name in ("global_crops_size", "local_crops_size")}
    return {f"crops.{name}": -(-size // patch) * patch for name, size in sizes.items() if size % patch}


def _numbers_to_take_back(architecture: Architecture, cfg: Config, settings: Mapping[str, Any]) -> dict[str, None]:
    """Name numbers of the config's that replace those of a named size, where they are not the file's."""
    have = {name: getattr(architecture, name) for name in ("embed_dim", "depth", "num_heads", "ffn_ratio")}
    wrong = {
        f"student.{name}"
        for name, value in have.items()
        if value is not None and getattr(cfg.student, name) not in (None, value)
    }
    return {key: None for key in sorted(wrong - settings.keys())}


def _is_set(cfg: Config, key: str, value: Any) -> bool:
    """Say whether a config already has a setting, or one that makes the same tensors."""
    section, name = key.split(".")
    has = getattr(getattr(cfg, section), name)
    if name == "layerscale":
        return bool(has) == bool(value)
    return has == value or (name == "ffn_layer" and {has, value} <= _GATED)


def format_table(found: Mapping[str, Any]) -> str:
    """Lay the description out for the screen, one line for each fact."""
    rows = _file_rows(found)
    if "not_whole" in found:
        rows["architecture"] = f"unknown: it {found['not_whole']}"
    else:
        rows |= _architecture_rows(found["architecture"])
        of = "the config's" if "fits" in found else "the defaults"
        rows[f"settings, if not {of}"] = format_settings(found["differing_settings"]) or "none"
    if "fits" in found:
        rows |= _fit_rows(found)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items() if value)


def _file_rows(found: Mapping[str, Any]) -> dict[str, str]:
    networks = ", ".join(
        f"{name} ({count} tensors)" if name else f"{count} tensors" for name, count in found["networks"].items()
    )
    taken = f"; taken: {found['network']}" if len(found["networks"]) > 1 else ""
    heads = [
        f"{name} ({head['num_prototypes']} prototypes, {head['num_layers']} layers)" if head else name
        for name, head in found["heads"].items()
    ]
    return {
        "file": found["path"],
        "kind": found["kind"],
        "networks": networks + taken,
        "other entries": list_names(found["other_entries"]),
        "names of": found["names"],
        "number formats": ", ".join(found["dtypes"]),
        "heads": ", ".join(heads),
        "no part of these": list_names(found["unused"]),
    }


def _architecture_rows(found: Mapping[str, Any]) -> dict[str, str]:
    size = found["arch"] or "no named size"
    rows = {
        "architecture": f"{size} ({found['family']}): {found['depth']} blocks, {found['embed_dim']} features"
        + (f", {found['num_heads']} heads" if found["num_heads"] else ""),
        "images": f"{found['in_chans']} channels, patches of {found['patch_size']} px",
    }
    if found["family"] == "resnet":
        rows["images"] = f"{found['in_chans']} channels"
    else:
        options = ("layerscale", "qkv_bias", "proj_bias", "ffn_bias", "mask_k_bias")
        options += ("untie_cls_and_patch_norms", "untie_global_and_local_cls_norm")
        rows |= {
            "registers": str(found["num_registers"]),
            "positions": _positions(found),
            "feed-forward": f"{found['ffn_layer']}, {found['ffn_hidden']} wide",
            "norms": found["norm_layer"],
            "has": ", ".join(name for name in options if found[name]),
        }
    return rows | {"parameters": format_count(found["num_parameters"])}


def _positions(found: Mapping[str, Any]) -> str:
    if found["num_positions"] is None:
        return "rotary"
    size = found["image_size"]
    grid = f" (images of {size} px)" if size else ""
    return f"{found['num_positions']} learned{grid}"


def _fit_rows(found: Mapping[str, Any]) -> dict[str, str]:
    rows = {"config": found["config"] or "defaults and the keys given"}
    load = found["load"]
    if load is None:
        return rows | {"fits": f"no: {found['problem'].removeprefix(found['path'] + ': ')}"}

    def row(fate: str, names: Sequence[str] = (), *, unit: str = "tensor") -> str:
        count = len(load[fate])
        listed = f": {list_names(names)}" if names else ""
        values = format_count(load["num_parameters"][fate])
        return f"{count} {unit}{'s' if count > 1 else ''}, {values} values{listed}" if count else "0"

    resized = [f"{name} ({text})" for name, text in load["resized"].items()]
    return rows | {
        "fits": "yes" if not load["missing"] else "yes, but for what is left at initial values",
        "would be loaded": row("loaded"),
        "converted": row("converted"),
        "resized": row("resized", resized),
        "left at initial values": row("missing", load["missing"]),
        "heads": row("heads", load["heads"], unit="head"),
        "unused": row("unused", load["unused"]),
    }
