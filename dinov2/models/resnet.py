"""ResNets as students: torchvision's networks without their classifier, behind the interface of the vision transformer.

Shapes: B images, C channels, N cells of the last map (row-major), D features.
Source: He et al. 2015, arXiv:1512.03385; torchvision's form, with its parameter names.
"""

import torch
import torchvision
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.layers.batch_norm import BatchNorm2d
from dinov2.layers.sync_batchnorm import SyncBatchNorm
from dinov2.models.vision_transformer import Features

RESNETS: dict[str, int] = {  # features D
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet152": 2048,
}
_STAGES = ("layer1", "layer2", "layer3", "layer4")


class ResNet(nn.Module):
    """Turn images into a pooled feature, in the place of the class token, and a map, in the place of patch tokens.

    Args:
        arch: a key of `RESNETS`.
        in_chans: channels C.
        sync_batchnorm: in training, take batch statistics over all ranks instead of each rank's own.

    Raises:
        ConfigError: the name is unknown.
    """

    patch_size = 32  # pixels from one cell of the last map to the next
    num_register_tokens = 0

    def __init__(self, arch: str, in_chans: int = 3, sync_batchnorm: bool = False) -> None:
        super().__init__()
        if arch not in RESNETS:
            raise ConfigError(f"arch={arch}: must be one of {', '.join(RESNETS)}")
        norm = SyncBatchNorm if sync_batchnorm else BatchNorm2d
        trunk = torchvision.models.get_model(arch, weights=None, norm_layer=norm)
        for name, child in trunk.named_children():
            if name != "fc":
                self.add_module(name, child)
        if in_chans != 3:
            self.conv1 = nn.Conv2d(in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.in_chans = in_chans
        self.embed_dim = self.num_features = RESNETS[arch]
        self.depth = self.n_blocks = len(self.shard_units())
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters and buffers, by torchvision's rule: He's normal, norms one and zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.reset_parameters()  # draws nothing

    def shard_units(self) -> list[nn.Module]:
        """List the modules whose parameters are gathered together when the model is sharded."""
        return [block for stage in _STAGES for block in getattr(self, stage)]

    def no_weight_decay(self) -> set[str]:
        """Name parameters that are no weights of a product, besides vectors: none."""
        return set()

    def layer_id(self, param_name: str) -> int:
        """Return a parameter's depth: 0 for the first convolution and its norm, i + 1 for residual block i."""
        stage, number = (param_name.split(".") + [""])[:2]
        if stage not in _STAGES:
            return 0
        before = _STAGES[: _STAGES.index(stage)]
        return sum(len(getattr(self, name)) for name in before) + int(number) + 1

    def forward(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None, is_training: bool = False
    ) -> Tensor | list[Tensor] | Features | list[Features]:
        """Return the pooled features [B, D], or all features (see `forward_features`) if `is_training`."""
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [part["x_norm_clstoken"] for part in features]
        return features["x_norm_clstoken"]

    def forward_features(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None
    ) -> Features | list[Features]:
        """Compute the features of images, or of several crop sizes one after the other, each with its own statistics.

        Args:
            x: images [B, C, height, width] of any size, or a list of such tensors.
            masks: handed through to the result, without effect: a convolution has no token to put in a patch's place.

        Returns:
            One dict, or a list of them, with `x_norm_clstoken` [B, D] (mean of the last map), `x_norm_regtokens`
            [B, 0, D], `x_norm_patchtokens` [B, N, D] (the last map), `x_prenorm` [B, 1 + N, D] (both), and `masks`.
        """
        if isinstance(x, Tensor):
            return self._forward_crop(x, masks)
        masks = [None] * len(x) if masks is None else masks
        return [self._forward_crop(crop, mask) for crop, mask in zip(x, masks, strict=True)]

    def _forward_crop(self, x: Tensor, mask: Tensor | None) -> Features:
        if x.shape[1] != self.in_chans:
            raise ValueError(f"images have {x.shape[1]} channels, the model was built for in_chans={self.in_chans}")
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for block in self.shard_units():
            x = block(x)
        pooled, cells = self.avgpool(x).flatten(1), x.flatten(2).transpose(1, 2)
        return {
            "x_norm_clstoken": pooled,
            "x_norm_regtokens": cells[:, :0],
            "x_norm_patchtokens": cells,
            "x_prenorm": torch.cat([pooled[:, None], cells], dim=1),
            "masks": mask,
        }
