"""The file configs/ssl_default_config.yaml: every setting with its default and the comment of its dataclass field."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml

from dinov2.configs.config import Config
from dinov2.configs.default_layers import DINOV3_DEFAULTS
from dinov2.configs.tree import REQUIRED, is_setting, leaves, subsections
from dinov2.configs.values import split_optional

_WIDTH = 120
_HEAD = """\
# Every setting with its default. Made by `make config-reference` from the dataclasses in dinov2/configs; edit those.
# A file of your own needs only the keys that differ. A step is one optimiser step; an epoch is
# train.OFFICIAL_EPOCH_LENGTH steps. The defaults are DINOv2's. With `defaults: dinov3`, or in a file of DINOv3 itself
# (one with MODEL.META_ARCHITECTURE), those that a comment names as DINOv3's hold instead, and optim.lr may stand for
# optim.base_lr: base_lr is 4 * lr with scaling_rule sqrt_wrt_1024, as DINOv3's rule has this factor, else lr.
"""


def reference_yaml() -> str:
    """Return the text of configs/ssl_default_config.yaml."""
    return _HEAD + "\n" + "\n".join(_section_lines(Config, indent="")) + "\n"


def field_comments(section: type) -> dict[str, str]:
    """Return the comment above and beside each field of a dataclass, joined into one line."""
    comments: dict[str, str] = {}
    for cls in reversed([cls for cls in section.__mro__ if dataclasses.is_dataclass(cls)]):
        source = textwrap.dedent(inspect.getsource(cls))
        by_line = {
            token.start[0]: (token.string.removeprefix("#").strip(), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (definition,) = ast.parse(source).body
        for node in definition.body:
            if isinstance(node, ast.AnnAssign):
                comments[node.target.id] = _join_comment(by_line, node)
    return comments


def _join_comment(by_line: dict[int, tuple[str, bool]], node: ast.AnnAssign) -> str:
    first = node.lineno
    while by_line.get(first - 1, ("", False))[1]:  # lines above that hold nothing but a comment
        first -= 1
    return " ".join(by_line[line][0] for line in range(first, node.end_lineno + 1) if line in by_line)


def _section_lines(section: type, *, indent: str) -> Iterator[str]:
    inner, comments = subsections(section), field_comments(section)
    for field in dataclasses.fields(section):
        if field.name in inner:
            yield ""
            yield f"{indent}# {inspect.getdoc(inner[field.name]).splitlines()[0]}"
            lines = _section_lines(inner[field.name], indent=f"{indent}  ")
            if field.default is None:  # an optional section, absent by default
                yield f"{indent}{field.name}: null"
                lines = (f"{indent}# {line.removeprefix(indent)}" for line in lines if line)
            else:
                yield f"{indent}{field.name}:"
            yield from lines
        elif is_setting(field):
            leaf = leaves(section)[field.name]
            comment = _with_choices(comments[field.name], leaf.annotation) + _in_dinov3(section, field.name)
            yield from _key_lines(f"{indent}{field.name}: {_as_yaml(leaf.default)}", comment, indent=indent)


def _key_lines(line: str, comment: str, *, indent: str) -> Iterator[str]:
    """Put the comment beside the key if it fits, else above it."""
    if len(line) + len(comment) + 4 <= _WIDTH:
        yield f"{line}  # {comment}"
    else:
        yield from textwrap.wrap(comment, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        yield line


def _with_choices(comment: str, annotation: Any) -> str:
    """Name the choices of a key, unless its comment explains each of them."""
    kind, _ = split_optional(annotation)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return comment if all(choice in comment for choice in choices) else f"{' | '.join(choices)}; {comment}"


def _in_dinov3(section: type, name: str) -> str:
    """Name the default of DINOv3's layer, if it is another."""
    key = f"{section.KEY}.{name}" if section is not Config else name
    return f"; DINOv3: {_as_yaml(DINOV3_DEFAULTS[key])}" if key in DINOV3_DEFAULTS else ""


def _as_yaml(value: Any) -> str:
    if value is REQUIRED:
        return "..."
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=_WIDTH).removesuffix("...\n").strip()
