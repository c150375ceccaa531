"""Names of Meta's own files and of our checkpoints: DINO, DINOv2 and DINOv3, and torchvision's ResNets."""

import re

from dinov2.hub.formats_naming import Naming, Place, layers, same, tensors
from dinov2.hub.stored_tensor import State

OFFICIAL = Naming(
    title="DINOv2",
    blocks=("blocks.",),
    trunk=tensors(
        same(("cls_token", "pos_embed", "register_tokens", "storage_tokens", "mask_token", "rope_embed.periods"))
    )
    | layers(same(("patch_embed.proj", "norm", "cls_norm", "local_cls_norm"))),
    block=layers(
        {"attn.qkv": ["attn.qkv", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("attn.q", "attn.k", "attn.v")]}
        | same(("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w1", "mlp.w2", "mlp.w3"))
    )
    | tensors(
        {"ls1.gamma": ["ls1.gamma", "ls1.weight"], "ls2.gamma": ["ls2.gamma", "ls2.weight"]}
        | same(("attn.qkv.bias_mask",))
    ),
)

_RESNET_NAME = re.compile(
    r"^(?:conv1\.weight|bn1\.\w+|layer[1-4]\.\d+\.(?:conv[123]\.weight|bn[123]\.\w+|downsample\.[01]\.\w+))$"
)


class ResNetNaming(Naming):
    """torchvision's names, which are the official ones here: each tensor keeps its own."""

    def find(self, name: str) -> Place | None:
        """Return the place of a tensor, None if it is not part of a ResNet's trunk."""
        return Place(name, (name,), 0) if _RESNET_NAME.match(name) else None

    def stray(self, name: str) -> str | None:
        """Return the name of an unknown tensor inside a stage, None for all other tensors."""
        return name if re.match(r"layer\d+\.\d+\.", name) else None

    def write(self, state: State) -> State:
        """Return the tensors under their own names."""
        return dict(state)


RESNET = ResNetNaming(title="torchvision ResNet", blocks=(), trunk={}, block={})
