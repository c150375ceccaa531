"""The losses of self-supervised training, one per file."""

from dinov2.loss.dino_clstoken_loss import DINOLoss
from dinov2.loss.feature_anchor_loss import FeatureAnchorLoss
from dinov2.loss.gram_loss import GramLoss
from dinov2.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2.loss.koleo_loss import KoLeoLoss

__all__ = ["DINOLoss", "FeatureAnchorLoss", "GramLoss", "KoLeoLoss", "iBOTPatchLoss"]
