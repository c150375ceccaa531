import pytest
import torch
import torchvision.transforms.v2.functional as reference
from support.images import photo

from dinov2.data import photometric
from dinov2.data.datasets.decoders import pil_to_tensor

FACTORS = torch.tensor([0.6, 1.0, 1.37, 0.0])


@pytest.fixture
def images():
    rows = torch.stack([pil_to_tensor(photo(number, size=(40, 40))) for number in range(4)]) / 255
    rows[0, :, :10] = rows[0, :, :10].mean(0)  # grey pixels have no hue
    rows[1, :, :5] = 0
    rows[1, :, 5:10] = 1
    rows[2, :2, :10] = rows[2, 1:, :10].amax(0)  # two channels share the largest value
    return rows


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_blends_agree_with_torchvision(images, name):
    ours = getattr(photometric, f"adjust_{name}")(images, FACTORS)
    theirs = [getattr(reference, f"adjust_{name}")(*row) for row in zip(images, FACTORS.tolist(), strict=True)]
    torch.testing.assert_close(ours, torch.stack(theirs), atol=2e-6, rtol=0)


@pytest.mark.parametrize("turns", [[0.1, -0.1, 0.03, 0.0], [0.5, -0.5, 0.25, -0.33]])
def test_hue_agrees_with_torchvision(images, turns):
    theirs = torch.stack([reference.adjust_hue(*row) for row in zip(images, turns, strict=True)])
    ours = photometric.adjust_hue(images, torch.tensor(turns))
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)  # the hue passes through a division


def test_grey_and_solarize_agree_with_torchvision(images):
    torch.testing.assert_close(photometric.to_grey(images), reference.rgb_to_grayscale(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(photometric.solarize(images, 0.5), reference.solarize(images, 0.5))


@pytest.mark.parametrize("size", [(40, 40), (5, 9)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_agrees_with_torchvision(images, size, channels):
    rows = images[:, :channels, : size[0], : size[1]]
    sigmas = [0.1, 0.7, 1.3, 2.0]
    theirs = torch.stack(
        [reference.gaussian_blur(row, [9, 9], [sigma, sigma]) for row, sigma in zip(rows, sigmas, strict=True)]
    )
    torch.testing.assert_close(photometric.gaussian_blur(rows, torch.tensor(sigmas)), theirs, atol=1e-6, rtol=0)


def test_contrast_of_other_channel_numbers_keeps_each_channels_mean():
    images = torch.rand(2, 5, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    changed = photometric.adjust_contrast(images, torch.tensor([0.5, 1.2]))
    torch.testing.assert_close(changed.mean((2, 3)), images.mean((2, 3)))
    one = images[:, :1]
    theirs = torch.stack([reference.adjust_contrast(one[0], 0.5), reference.adjust_contrast(one[1], 1.2)])
    torch.testing.assert_close(photometric.adjust_contrast(one, torch.tensor([0.5, 1.2])), theirs)


def test_images_are_left_unchanged(images):
    before = images.clone()
    for change in (photometric.adjust_brightness, photometric.adjust_contrast, photometric.adjust_saturation):
        change(images, FACTORS)
    photometric.adjust_hue(images, FACTORS / 10)
    photometric.gaussian_blur(images, FACTORS + 0.1)
    photometric.solarize(images, 0.5)
    assert torch.equal(images, before)
