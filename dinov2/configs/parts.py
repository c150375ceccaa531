"""Names of parts of a backbone, as keys like optim.freeze list them, and whether a backbone has such a part."""

import re
from collections.abc import Sequence

from dinov2.configs.section import Section, show_value
from dinov2.configs.student_section import StudentConfig
from dinov2.errors import ConfigError

EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "registers", "mask_token")
KINDS = (*EMBEDDINGS, "embeddings", "norms", "layerscale", "attention", "mlp")
_OF_RESNETS = ("patch_embed", "embeddings", "norms")
_BLOCKS = re.compile(r"blocks:(\d+)(?:-(\d+))?")


def block_range(part: str) -> range | None:
    """Return the blocks that `blocks:3` or `blocks:0-5` names, the last one included; None for another part."""
    match = _BLOCKS.fullmatch(part)
    return None if match is None else range(int(match[1]), int(match[2] or match[1]) + 1)


def require_part_names(section: Section, name: str) -> None:
    """Raise ConfigError if field `name`, a list of parts, holds something that can be no part of any backbone."""
    for part in getattr(section, name):
        blocks = block_range(part)
        if part not in KINDS and not blocks:
            raise ConfigError(
                f"{section.KEY}.{name}={show_value(getattr(section, name))}: {part!r} is no part of a backbone; use "
                f"{', '.join(KINDS)}, blocks:0-5 or blocks:3"
            )


def require_parts(key: str, parts: Sequence[str], student: StudentConfig) -> None:
    """Raise ConfigError if key `key` lists a part that this backbone does not have."""
    for part in parts:
        blocks = block_range(part)
        if blocks is not None:
            absent = f"its blocks are 0 to {student.num_blocks - 1}" if blocks[-1] >= student.num_blocks else None
        else:
            absent = _why_absent(part, student)
        if absent:
            raise ConfigError(f"{key}={show_value(tuple(parts))}: the backbone has no {part!r}: {absent}; leave it out")


def _why_absent(part: str, student: StudentConfig) -> str | None:
    if student.is_resnet:
        return None if part in _OF_RESNETS else f"student.arch={student.arch} is no ViT"
    if part == "pos_embed" and student.pos_embed_type == "rope":
        return "with student.pos_embed_type=rope, no positions are learned"
    if part == "registers" and not student.num_register_tokens:
        return "student.num_register_tokens=0"
    if part == "layerscale" and not student.layerscale:
        return f"student.layerscale={show_value(student.layerscale)}"
    return None
