import numpy as np
import pytest
import torch
from support.images import photo
from torchvision import transforms

from dinov2.data import make_classification_eval_transform
from dinov2.data.datasets.decoders import pil_to_tensor


def parents(resize_size, crop_size):
    return transforms.Compose(
        [
            transforms.Resize(resize_size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(crop_size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


@pytest.mark.parametrize("size", [(96, 64), (61, 97), (64, 64), (20, 31)])
def test_images_come_out_as_the_parents_transform_gives_them(size):
    image = photo(size=size)
    ours = make_classification_eval_transform(40, 32)(image)
    assert ours.shape == (3, 32, 32)
    assert ours.dtype == torch.float32
    assert (ours - parents(40, 32)(image)).abs().max() < 3 / 255 / 0.224  # fixed-point weights of both libraries


def test_tensors_of_any_depth_and_channels_are_taken():
    image = pil_to_tensor(photo())
    transform = make_classification_eval_transform(40, 32, (0.5,), (0.25,))
    narrow = transform(image[:1])
    for other in ((image[:1].to(torch.int32) * 257).to(torch.uint16), image[:1] / 255):
        assert (transform(other) - narrow).abs().max() < 3 / 255 / 0.25
    five = make_classification_eval_transform(40, 32, (0.5,) * 5, (0.25,) * 5)(image[[0, 1, 2, 0, 1]])
    assert five.shape == (5, 32, 32)
    grey = transform(photo().convert("L"))
    assert grey.shape == (1, 32, 32)


def test_a_crop_larger_than_the_resized_image_enlarges_it():
    assert make_classification_eval_transform(16, 32)(photo()).shape == (3, 32, 32)
    assert np.isfinite(make_classification_eval_transform(32, 32)(photo(size=(1, 1))).numpy()).all()
