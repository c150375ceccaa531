import pytest
import torch
import torchvision.transforms.v2.functional as reference
from support.images import encode, photo

from dinov2.data import DataAugmentationDINO
from dinov2.data.augmentations import IMAGENET_MEAN, IMAGENET_STD
from dinov2.data.datasets.decoders import EncodedImage, pil_to_tensor
from dinov2.errors import DatasetError

NOTHING = {
    "color_jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": (0.0, 0.0, 0.0),
    "solarize_probability": (0.0, 0.0, 0.0),
}


def augmentation(**options):
    return DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, 24, 16, **options)


def batch(augment, count, *, size=(48, 40), first=0):
    samples = [augment.crop(photo(number, size=size), seed=1000 + number) for number in range(first, first + count)]
    return augment.stack(samples), torch.arange(1000 + first, 1000 + first + count)


def row_by_crop(stacked, count):
    """[crops * B, ...] to [crops, B, ...]."""
    return stacked.unflatten(0, (-1, count))


def test_a_call_gives_the_parents_dict():
    crops = augmentation()(photo())
    assert set(crops) == {"global_crops", "global_crops_teacher", "local_crops", "offsets"}
    assert [tuple(crop.shape) for crop in crops["global_crops"]] == [(3, 24, 24)] * 2
    assert [tuple(crop.shape) for crop in crops["local_crops"]] == [(3, 16, 16)] * 3
    assert all(crop.dtype == torch.float32 for crop in crops["global_crops"] + crops["local_crops"])
    assert crops["offsets"] == ()


def test_everything_follows_from_the_seed():
    augment = augmentation()
    first, again, other = (augment(photo(), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.stack(first["local_crops"]), torch.stack(again["local_crops"]))
    assert not torch.equal(first["global_crops"][0], other["global_crops"][0])


def test_global_random_state_is_neither_read_nor_changed():
    state = torch.random.get_rng_state()
    augment = augmentation()
    first = augment(photo(), seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augment(photo(), seed=5)["global_crops"][0], first["global_crops"][0])


def test_an_encoded_image_gives_the_crops_of_the_decoded_one():
    data = encode(photo(size=(60, 50)), "PNG")
    augment = augmentation()
    ours, reference_crops = augment.crop(EncodedImage(data), 3), augment.crop(EncodedImage(data).to_pil(), 3)
    for crop, expected in zip(ours["local_crops"], reference_crops["local_crops"], strict=True):
        assert torch.equal(crop, expected)


def test_crops_of_a_sample_do_not_depend_on_the_rest_of_the_batch():
    augment = augmentation()
    whole = augment.finish(*batch(augment, 7))
    part = augment.finish(*batch(augment, 3, first=2))
    for name in ("collated_global_crops", "collated_local_crops"):
        expected = row_by_crop(whole[name], 7)[:, 2:5].flatten(0, 1)
        torch.testing.assert_close(part[name], expected, atol=1e-6, rtol=0)  # order of sums in the mean of contrast


def test_large_batches_are_finished_in_pieces_that_do_not_show():
    augment = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 1, 224, 224)
    crops, seeds = batch(augment, 3)
    whole = augment.finish(crops, seeds)["collated_local_crops"]
    alone = augment.finish({name: value[2::3] for name, value in crops.items()}, seeds[2:])["collated_local_crops"]
    torch.testing.assert_close(whole[2:], alone, atol=1e-6, rtol=0)


def test_other_entries_pass_and_the_input_stays_as_it_is():
    augment = augmentation()
    crops, seeds = batch(augment, 2)
    before = crops["collated_global_crops"].clone()
    finished = augment.finish({**crops, "seeds": seeds, "n_masked_patches": 4}, seeds)
    assert finished["n_masked_patches"] == 4
    assert torch.equal(crops["collated_global_crops"], before)
    assert not torch.equal(finished["collated_global_crops"], before)


def test_without_photometric_changes_only_the_normalisation_remains():
    augment = augmentation(**NOTHING)
    crops, seeds = batch(augment, 2)
    ours = augment.finish(crops, seeds)["collated_global_crops"]
    expected = reference.normalize(crops["collated_global_crops"].float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(ours, expected)


def changed_rows(name, probability, *, number=200, **options):
    """Share of the first global, second global and local crops that one change touches."""
    augment = augmentation(mean=(0.0,) * 3, std=(1.0,) * 3, **(NOTHING | {name: probability} | options))
    image = pil_to_tensor(photo(size=(24, 24)))
    crops = {
        "collated_global_crops": image.expand(2 * number, -1, -1, -1),
        "collated_local_crops": image.expand(3 * number, -1, -1, -1),
    }
    finished = augment.finish(crops, torch.arange(number))
    touched = [
        (row_by_crop(finished[key], number) - image / 255).abs().amax((2, 3, 4)) > 1e-4
        for key in ("collated_global_crops", "collated_local_crops")
    ]
    return [touched[0][0].float().mean(), touched[0][1].float().mean(), touched[1].float().mean()]


@pytest.mark.parametrize(
    ("name", "probability", "shares"),
    [
        ("color_jitter_probability", 0.8, (0.8, 0.8, 0.8)),
        ("grayscale_probability", 0.2, (0.2, 0.2, 0.2)),
        ("blur_probability", (1.0, 0.1, 0.5), (0.9, 0.1, 0.45)),  # sigmas below 0.28 px change almost nothing
        ("solarize_probability", (0.0, 0.2, 0.0), (0.0, 0.2, 0.0)),
    ],
)
def test_each_change_has_its_probability(name, probability, shares):
    for share, expected in zip(changed_rows(name, probability), shares, strict=True):
        assert abs(share - expected) < 0.11  # 3.3 standard deviations of 200 draws


def finish_one(augment, image, draws, row):
    """Plain twin of the device half: one float image, torchvision's functions."""
    jitters = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    for number in draws.order[row].tolist() if draws.jittered[row] else ():
        image = jitters[number](image, draws.factors[row, number].item())
    if draws.greyed[row]:
        image = reference.rgb_to_grayscale(image, num_output_channels=3)
    if draws.blurred[row]:
        image = reference.gaussian_blur(image, [9, 9], [draws.sigmas[row].item()] * 2)
    if draws.solarized[row]:
        image = reference.solarize(image, augment.solarize_threshold)
    return reference.normalize(image, augment.mean, augment.std)


def test_the_device_half_is_torchvisions_row_by_row():
    augment = augmentation(solarize_threshold=0.473)  # no multiple of 1 / 255, where rounding would decide
    crops, seeds = batch(augment, 24)
    finished = augment.finish(crops, seeds)
    for name, first_crop in (("collated_global_crops", 0), ("collated_local_crops", 2)):
        num_crops = len(crops[name]) // len(seeds)
        numbers = torch.arange(first_crop, first_crop + num_crops).repeat_interleave(len(seeds))
        draws = augment.draw(seeds.repeat(num_crops), numbers)
        for row, image in enumerate(crops[name]):
            expected = finish_one(augment, image.float() / 255, draws, row)
            # Solarisation is discontinuous: a last bit may decide on which side of its threshold a value lies.
            far = (finished[name][row] - expected).abs() > 1e-4
            assert far.float().mean() <= (0.01 if draws.solarized[row] else 0)


def test_draws_cover_their_ranges_and_all_orders():
    draws = augmentation().draw(torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    ranges = torch.tensor([[0.6, 1.4], [0.6, 1.4], [0.8, 1.2], [-0.1, 0.1]])
    width = ranges[:, 1] - ranges[:, 0]
    assert (draws.factors >= ranges[:, 0]).all()
    assert (draws.factors <= ranges[:, 1]).all()
    assert (draws.factors.amin(0) - ranges[:, 0] < 0.01 * width).all()
    assert (ranges[:, 1] - draws.factors.amax(0) < 0.01 * width).all()
    assert draws.sigmas.min() >= 0.1
    assert draws.sigmas.max() <= 2.0
    counts = torch.unique(draws.order, dim=0, return_counts=True)[1]
    assert len(counts) == 24
    assert counts.min() > 100  # of 167, 5 standard deviations


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels_go_without_colour(channels):
    augment = augmentation(in_chans=channels, grayscale_probability=1.0)
    image = pil_to_tensor(photo(size=(40, 40)))[torch.arange(channels) % 3]
    finished = augment(image, seed=1)
    assert finished["global_crops"][0].shape == (channels, 24, 24)
    if channels > 1:
        assert not torch.equal(finished["global_crops"][0][0], finished["global_crops"][0][1])


def test_16_bits_give_the_crops_of_8_bits():
    augment = augmentation()
    image = pil_to_tensor(photo(size=(40, 40)))
    narrow = augment(image, seed=3)
    wide = augment((image.to(torch.int32) * 257).to(torch.uint16), seed=3)
    for crop, expected in zip(wide["local_crops"], narrow["local_crops"], strict=True):
        assert (crop - expected).abs().mean() < 0.02  # 8-bit rounding of the resized crop, in standard deviations


def test_no_local_crops_is_an_empty_tensor():
    augment = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 0, 24, 16)
    crops, seeds = batch(augment, 2)
    finished = augment.finish(crops, seeds)
    assert finished["collated_local_crops"].shape == (0, 3, 16, 16)
    assert finished["collated_global_crops"].shape == (4, 3, 24, 24)


def test_images_that_do_not_fit_are_named():
    with pytest.raises(DatasetError, match="it has 1 channels, but student.in_chans=3"):
        augmentation().crop(photo().convert("L"), 0)
    narrow = augmentation().crop(photo(), 0)
    wide = augmentation().crop(pil_to_tensor(photo()).to(torch.uint16), 0)
    with pytest.raises(DatasetError, match="images of different kinds of pixels in one batch: uint16, uint8"):
        augmentation().stack([narrow, wide])


@pytest.mark.gpu
def test_the_device_half_gives_the_same_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    augment = augmentation()
    crops, seeds = batch(augment, 6)
    on_cpu = augment.finish(crops, seeds)
    on_gpu = augment.finish({name: value.cuda() for name, value in crops.items()}, seeds)
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), value, atol=1e-4, rtol=0)  # exp and sums differ in the last bits
