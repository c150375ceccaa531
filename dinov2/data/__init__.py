"""Images for training and evaluation: dataset strings, augmentation, masks, samplers, loaders."""

from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.collate import MaskedCollate
from dinov2.data.loaders import make_data_loader, make_dataset
from dinov2.data.masking import MaskingGenerator, MaskPlan
from dinov2.data.samplers import SamplerType, make_sampler, make_stream, pass_size
from dinov2.data.transforms import make_classification_eval_transform

__all__ = [
    "DataAugmentationDINO",
    "MaskPlan",
    "MaskedCollate",
    "MaskingGenerator",
    "SamplerType",
    "make_classification_eval_transform",
    "make_data_loader",
    "make_dataset",
    "make_sampler",
    "make_stream",
    "pass_size",
]
