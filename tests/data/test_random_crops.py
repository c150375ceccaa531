import random

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import encode, photo
from torchvision.transforms import RandomResizedCrop

from dinov2.data.datasets.decoders import EncodedImage, pil_to_tensor
from dinov2.data.random_crops import CropBox, cut_crops, draw_box


def box(top, left, height, width, size, *, horizontally=False, vertically=False):
    return CropBox(top, left, height, width, size, horizontally, vertically)


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (64, 64), (20, 400)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_are_distributed_as_torchvisions(shape, scale):
    rng = random.Random(0)
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    ours, theirs = [], []
    for _ in range(2000):
        drawn = draw_box(*shape, scale=scale, size=96, flips=(0, 0), rng=rng)
        ours.append((drawn.top, drawn.left, drawn.height, drawn.width))
        theirs.append(RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)))
    ours, theirs = np.array(ours), np.array(theirs)
    spread = theirs.std(0) / 2000**0.5
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 6 * spread + 0.02).all()
    for quantile in (0.1, 0.5, 0.9):
        difference = np.quantile(ours, quantile, axis=0) - np.quantile(theirs, quantile, axis=0)
        assert (np.abs(difference) <= 0.1 * theirs.std(0) + 1).all()
    assert (ours >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= shape[1]).all()


def test_flips_have_their_probabilities():
    rng = random.Random(0)
    drawn = [draw_box(50, 50, scale=(0.1, 1), size=8, flips=(0.5, 0.2), rng=rng) for _ in range(2000)]
    assert abs(sum(item.flip_horizontally for item in drawn) / 2000 - 0.5) < 0.05
    assert abs(sum(item.flip_vertically for item in drawn) / 2000 - 0.2) < 0.05


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("region", [(10, 20, 60, 50, 32), (0, 0, 90, 120, 32), (5, 5, 20, 20, 48)])
def test_crops_are_pillows_bicubic_ones(mode, region):
    image = photo(size=(120, 90)).convert(mode)
    top, left, height, width, size = region
    (crop,) = cut_crops(image, [box(*region)])
    reference = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    difference = (crop.float() - pil_to_tensor(reference).float()).abs()
    assert crop.dtype == torch.uint8
    assert difference.max() <= 2  # fixed-point weights of both libraries
    assert difference.mean() < 0.5


def test_flips_mirror_the_crop():
    image = photo(size=(40, 30))
    plain, across, down = cut_crops(
        image,
        [
            box(0, 0, 30, 30, 16),
            box(0, 0, 30, 30, 16, horizontally=True),
            box(0, 0, 30, 30, 16, vertically=True),
        ],
    )
    assert torch.equal(across, plain.flip(-1))
    assert torch.equal(down, plain.flip(-2))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_tensors_of_8_and_16_bits_and_any_channels_give_the_same_crop(channels):
    image = pil_to_tensor(photo(size=(60, 50)))[torch.arange(channels) % 3]
    wide = (image.to(torch.int32) * 257).to(torch.uint16)
    boxes = [box(5, 3, 30, 40, 16), box(0, 0, 50, 60, 32)]
    for narrow_crop, wide_crop in zip(cut_crops(image, boxes), cut_crops(wide, boxes), strict=True):
        assert wide_crop.dtype == torch.uint16
        assert (wide_crop.float() / 257 - narrow_crop.float()).abs().max() <= 2  # rounding of the 8-bit path


def test_crops_of_a_reduced_jpeg_are_close_to_those_of_the_whole():
    image = photo(size=(640, 480))
    data = encode(image, quality=95)
    boxes = [box(31, 57, 300, 401, 64), box(0, 0, 480, 640, 64), box(111, 93, 201, 203, 48, horizontally=True)]
    assert EncodedImage(data).to_pil(reduce=201 / 48 / 2).size == (320, 240)
    reduced = cut_crops(EncodedImage(data), boxes)
    whole = cut_crops(EncodedImage(data).to_pil(), boxes)
    for crop, reference in zip(reduced, whole, strict=True):
        assert (crop.float() - reference.float()).abs().mean() < 4


def test_an_image_of_one_pixel_can_be_cropped():
    crops = cut_crops(Image.new("RGB", (1, 1), (9, 8, 7)), [box(0, 0, 1, 1, 8)])
    assert crops[0].shape == (3, 8, 8)
    assert crops[0][:, 4, 4].tolist() == [9, 8, 7]


def test_float_tensors_are_refused():
    with pytest.raises(TypeError, match="an image is uint8 or uint16, not torch.float32"):
        cut_crops(torch.zeros(3, 8, 8), [box(0, 0, 8, 8, 4)])


class Parts:
    """A source that reads parts of a tensor and counts the pixels."""

    def __init__(self, pixels):
        self.pixels = pixels
        self.channels, self.height, self.width = pixels.shape
        self.num_read = 0

    def to_tensor(self, *, reduce=1.0):
        self.num_read += self.height * self.width
        return self.pixels

    def read_region(self, top, left, height, width):
        assert 0 <= top <= top + height <= self.height
        assert 0 <= left <= left + width <= self.width
        self.num_read += height * width
        return self.pixels[:, top : top + height, left : left + width].clone()


@pytest.mark.parametrize(
    ("boxes", "num_read"),
    [
        ([box(0, 0, 8, 8, 8), box(40, 50, 10, 10, 8, horizontally=True)], 8 * 8 + 10 * 10),  # far apart
        ([box(10, 10, 30, 30, 16), box(12, 8, 30, 30, 16, vertically=True)], 32 * 32),  # nearly the same place
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_a_source_of_parts_gives_the_same_crops_and_reads_as_little_as_it_can(boxes, num_read, dtype):
    whole = pil_to_tensor(photo(size=(64, 56))).to(dtype)
    source = Parts(whole)
    for crop, reference in zip(cut_crops(source, boxes), cut_crops(whole, boxes), strict=True):
        assert torch.equal(crop, reference)
    assert source.num_read == num_read


def test_a_source_of_parts_that_gives_floats_is_refused():
    with pytest.raises(TypeError, match="an image is uint8 or uint16, not torch.float32"):
        cut_crops(Parts(torch.zeros(3, 8, 8)), [box(0, 0, 8, 8, 4)])
