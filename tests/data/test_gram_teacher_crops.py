"""Crops for a Gram teacher: the global crops once more, in another size, with or without the photometric changes."""

import torch
import torch.nn.functional as F
from support.images import photo

from dinov2.data import DataAugmentationDINO

NAMES = ("collated_global_crops", "collated_local_crops")
OF_GRAM = "collated_gram_teacher_crops"
SMOOTH = {"color_jitter_probability": 0.0, "grayscale_probability": 0.0, "solarize_probability": (0.0, 0.0, 0.0)}


def finished(count=3, **options):
    augment = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 24, 16, **options)
    samples = [augment.crop(photo(number, size=(96, 80)), seed=50 + number) for number in range(count)]
    return augment.finish(augment.stack(samples), torch.arange(50, 50 + count))


def test_other_crops_are_as_they_were():
    without, with_gram = finished(), finished(gram_teacher_crops_size=48)
    assert set(without) == set(NAMES)
    assert set(with_gram) == {*NAMES, OF_GRAM}
    assert with_gram[OF_GRAM].shape == (6, 3, 48, 48)
    for name in NAMES:
        assert torch.equal(without[name], with_gram[name])


def test_they_are_the_global_crops_with_the_same_distortions():
    crops = finished(gram_teacher_crops_size=24)
    assert torch.equal(crops[OF_GRAM], crops["collated_global_crops"])


def test_they_can_do_without_distortions():
    crops = finished(gram_teacher_crops_size=24, gram_teacher_no_distortions=True)
    none = finished(color_jitter_probability=0.0, grayscale_probability=0.0, blur_probability=(0.0,) * 3,
                    solarize_probability=(0.0,) * 3)  # fmt: skip
    assert torch.equal(crops[OF_GRAM], none["collated_global_crops"])
    assert not torch.equal(crops[OF_GRAM], crops["collated_global_crops"])


def test_a_larger_crop_is_blurred_as_much_as_the_picture_is_larger():
    options = SMOOTH | {"blur_sigma": (1.9, 2.0), "gram_teacher_crops_size": 72}
    blurred = finished(**options, blur_probability=(1.0, 1.0, 0.0))
    sharp = finished(**options, blur_probability=(0.0, 0.0, 0.0))
    shrunk = F.interpolate(blurred[OF_GRAM], (24, 24), mode="area")
    to_blurred = (shrunk - blurred["collated_global_crops"]).abs().mean()
    assert to_blurred < 0.25 * (shrunk - sharp["collated_global_crops"]).abs().mean()


def test_a_call_on_one_image_gives_them_too():
    augment = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 24, 16, gram_teacher_crops_size=48)
    crops = augment(photo(), seed=3)
    assert [tuple(crop.shape) for crop in crops["gram_teacher_crops"]] == [(3, 48, 48)] * 2
