"""The two layers of defaults: DINOv2's are the dataclasses'; DINOv3's differ from them in this table.

Source: DINOv3's default config, for the keys in which DINOv3 and DINOv2 train differently. Kept from DINOv2's layer:
compute_precision.param_dtype=auto (DINOv3: bf16), which is bf16 wherever a GPU has it; train.compile=false (DINOv3:
true), which costs minutes at each start and is honoured where a file sets it.
"""

from collections.abc import Mapping
from typing import Any, Literal

Family = Literal["dinov2", "dinov3"]

DINOV3_DEFAULTS: Mapping[str, Any] = {
    "dino.head_weight_norm": False,
    "ibot.head_weight_norm": False,
    "ibot.separate_head": True,
    "train.centering": "sinkhorn_knopp",
    "student.pos_embed_type": "rope",
    "compute_precision.sharding_strategy": "FULL_SHARD",
    "optim.lr": 0.001,  # input of the scaling rule; becomes optim.base_lr
}
LAYERS: Mapping[Family, Mapping[str, Any]] = {"dinov2": {}, "dinov3": DINOV3_DEFAULTS}
