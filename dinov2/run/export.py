"""Write a backbone for other programs: official names, timm, Hugging Face or safetensors.

    python run/export.py --pretrained-weights W --format dinov2|timm|hf|safetensors --output F [--checkpoint-key KEY]

The architecture is read from the tensors. Only the number of attention heads of a width without a name needs a config.
"""

import argparse
from collections.abc import Sequence

import torch

from dinov2.configs import Config, load_config
from dinov2.errors import ConfigError
from dinov2.eval.build import build_backbone
from dinov2.hub.export import FORMATS, export_weights
from dinov2.hub.weights import plan_weights
from dinov2.logging import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_program(_run, argv)


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Write a backbone so that another library, or the official code, loads it."
    )
    parser.add_argument(
        "--pretrained-weights",
        metavar="W",
        required=True,
        help="file (.pth, .pt, .bin, .safetensors), model folder, checkpoint of a run, timm:<name> or hf:<name>",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="dinov2: official names, by torch.save; safetensors: the same names; timm: a folder or file for timm; "
        "hf: a folder for transformers",
    )
    parser.add_argument(
        "--output",
        metavar="F",
        required=True,
        help="file (dinov2: .pth, safetensors: .safetensors), folder (hf), or either (timm)",
    )
    parser.add_argument(
        "--checkpoint-key",
        metavar="KEY",
        help="network to take from a file that holds several, teacher or student; default: teacher, or the student "
        "of a file without one",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists; default: refuse")
    parser.add_argument(
        "--config-file",
        "--config",
        metavar="F",
        help="YAML file of the run, for the number of attention heads; default: known from the size",
    )
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config keys over the file")
    return parser


def _run(argv: Sequence[str] | None) -> int:
    args = get_args_parser().parse_intermixed_args(argv)
    has_config = bool(args.config_file or args.opts)
    export = export_weights(
        args.pretrained_weights,
        args.output,
        target=args.format,
        checkpoint_key=args.checkpoint_key,
        num_heads=_num_heads(args) if has_config else None,
        overwrite=args.overwrite,
    )
    print(export)
    return 0


def _num_heads(args: argparse.Namespace) -> int | None:
    """Return the number of attention heads of the config, which must be that of the weights; None for a ResNet."""
    cfg = load_config(args.config_file, args.opts)
    with torch.device("meta"):
        model = build_backbone(cfg)
    plan_weights(model, args.pretrained_weights, checkpoint_key=args.checkpoint_key)
    if args.format in ("timm", "hf"):
        _require_official_rules(cfg, library=args.format)
    return getattr(model, "num_heads", None)


def _require_official_rules(cfg: Config, *, library: str) -> None:
    """Raise ConfigError where a backbone computes what the other library's models do not."""
    student = cfg.student
    if student.is_resnet:
        return
    is_rope = student.pos_embed_type == "rope"
    official = {"norm_layer": "layernormbf16" if is_rope else "layernorm"}
    if is_rope:
        official["pos_embed_rope_normalize_coords"] = "separate"
    for name, value in official.items():
        has = getattr(student, name)
        if has != value:
            raise ConfigError(
                f"student.{name}={has}: models of {library} have {value}, so that features would differ; "
                "export it as dinov2 or safetensors"
            )
