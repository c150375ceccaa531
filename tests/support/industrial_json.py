"""A small industrial dataset in the layout of `GroupedJSON`: photographs of plates with bolts, some of them missing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("negative", "positive")
_BOLTS = ((0.2, 0.25), (0.8, 0.25), (0.2, 0.75), (0.8, 0.75), (0.5, 0.5))


def make_grouped_json(
    root: Path,
    *,
    splits: Sequence[str] = ("train", "val", "test"),
    groups: int = 6,
    images_of_group: int = 3,
    size: tuple[int, int] = (64, 48),
    is_below_root: bool = True,
) -> dict[str, dict[str, Any]]:
    """Write annotations and images.

    Args:
        root: created if need be.
        splits: an annotation file each.
        groups: of each split; every other one is positive: bolts are missing.
        images_of_group: photographs of the same plate.
        size: width and height, px.
        is_below_root: img_path starts with the folder of the split; else with the group's.

    Returns:
        Contents of the annotation files by split.
    """
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    contents = {}
    for number, split in enumerate(splits):
        entries = []
        for group in range(groups):
            group_id, label = str(1_015_272 + 100 * number + group), group % 2
            (root / split / group_id).mkdir(parents=True, exist_ok=True)
            for shot in range(images_of_group):
                name = f"{group_id}/{group_id}-{shot}.jpeg"
                draw_plate(int(group_id), shot, has_all_bolts=label == 0, size=size).save(root / split / name)
                path = f"{split}/{name}" if is_below_root else name
                entries.append({"img_path": path, "gt_label": label, "group_id": group_id})
        contents[split] = {"metainfo": {"classes": list(CLASSES)}, "data_list": entries}
        write_annotations(root, split, contents[split])
    return contents


def write_annotations(root: Path, split: str, content: Any) -> Path:
    """Write an annotation file."""
    path = root / "annotations" / f"{split}.json"
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def draw_plate(plate: int, shot: int, *, has_all_bolts: bool, size: tuple[int, int]) -> Image.Image:
    """Draw one photograph of a plate; a plate has its colour and its missing bolts, a shot its light and place."""
    of_plate, of_shot = np.random.default_rng(plate), np.random.default_rng((plate, shot))
    colour = of_plate.uniform(100, 180) * np.array([1, *of_plate.uniform(0.85, 1.1, 2)])
    missing = () if has_all_bolts else of_plate.choice(len(_BOLTS), 2, replace=False)
    light = np.linspace(*of_shot.uniform(0.8, 1.2, 2), size[0])
    pixels = np.broadcast_to(light[None, :, None] * colour, (size[1], size[0], 3)) + of_shot.normal(
        0, 4, (size[1], 1, 1)
    )
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    shift, radius = of_shot.uniform(-0.05, 0.05, 2), 0.09 * min(size)
    for number, (across, down) in enumerate(_BOLTS):
        x, y = (across + shift[0]) * size[0], (down + shift[1]) * size[1]
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=(30, 30, 30) if number in missing else (225, 225, 215), outline=(70, 70, 70))
        if number not in missing:
            draw.line((x - radius / 2, y, x + radius / 2, y), fill=(90, 90, 90), width=max(1, round(radius / 4)))
    return image
