"""Pictures of what a backbone sees: PCA maps, attention maps, t-SNE; as functions and as commands."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.evaluation import MODEL, SIZES
from support.images import photo, write_photos

from dinov2.configs import load_config
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval import attention_maps, pca_maps, tsne
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.picture_images import WholeImage, as_dataset_string, load_images
from dinov2.models import build_model

CPU = torch.device("cpu")
SHAPE = {"depth": 2, "embed_dim": 48, "patch_size": 4, "img_size": 16, "init_values": 1.0}


def tiny(**more):
    model = build_model("vit_tiny", **SHAPE | more)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    state = {f"backbone.{name}": tensor for name, tensor in tiny().state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "w")
    write_photos(tmp_path / "photos", 7, num_classes=2, size=(24, 20))
    return tmp_path


def arguments(folder, *more):
    fixed = ["--pretrained-weights", str(folder / "w"), "--output-dir", str(folder / "out"), "--num-workers", "0"]
    return [*fixed, "--dataset", str(folder / "photos"), *more, *MODEL, *SIZES]


def fails_with(capsys, program, args, *, code=2):
    assert program.main(args) == code
    return capsys.readouterr().err.splitlines()[-1]


def size_of(path):
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
        assert pixels.std() > 5  # something is drawn
        return picture.size


# images


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 48), (44, 32)), ((48, 64), (32, 44)), ((400, 20), (96, 32)), ((7, 7), (32, 32))]
)
def test_a_whole_image_is_tiled_by_patches(size, expected):
    fractions, _ = WholeImage(32, patch_size=4)(photo(size=size))
    assert fractions.shape == (3, expected[1], expected[0])
    assert fractions.min() >= 0 and fractions.max() <= 1


def test_an_image_of_16_bits_is_shown_bright_enough():
    dark = torch.randint(0, 900, (1, 20, 20)).to(torch.uint16)
    fractions, window = WholeImage(16, patch_size=4)(dark)
    assert fractions.max() < 0.02 and window.high[0] < 0.02


def test_images_are_chosen_by_hash_and_normalised(folder):
    cfg = load_config(None, [f"train.output_dir={folder}", *MODEL, *SIZES])
    images = load_images(cfg, str(folder / "photos"), num_images=3, image_size_px=None)
    again = load_images(cfg, f"ImageFolder:root={folder}/photos", num_images=5, image_size_px=20)
    assert [image.name for image in images] != sorted(str(path) for path in folder.glob("photos/*/*"))[:3]
    assert {image.name for image in images} <= {image.name for image in again}
    assert images[0].values.shape == (3, 16, 20) and images[0].picture.size == (20, 16)
    shown = torch.from_numpy(np.array(images[0].picture)).permute(2, 0, 1) / 255
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    torch.testing.assert_close(images[0].values * std + mean, shown, atol=0.5 / 255 + 1e-6, rtol=0)


def test_an_image_that_cannot_be_read_is_left_out_if_the_config_says_so(folder, caplog):
    (folder / "photos" / "class_0" / "bad.jpg").write_bytes(b"no image")
    cfg = load_config(None, [f"train.output_dir={folder}", *MODEL, *SIZES])
    with pytest.raises(DatasetError, match=r"bad\.jpg"):
        load_images(cfg, str(folder / "photos"), num_images=40, image_size_px=16)
    cfg = load_config(None, [f"train.output_dir={folder}", *MODEL, *SIZES, "train.on_bad_image=skip"])
    assert len(load_images(cfg, str(folder / "photos"), num_images=40, image_size_px=16)) == 7
    assert "1 images that cannot be read are left out" in caplog.text


def test_a_folder_is_a_dataset_string(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert as_dataset_string(str(tmp_path)) == f"ImageFolder:root={tmp_path}"
    assert as_dataset_string(f"{tmp_path}/a:b") == f"ImageFolder:root='{tmp_path}/a:b'"
    assert as_dataset_string("Digits:split=VAL") == "Digits:split=VAL"


# PCA


def grids():
    """Two images whose patches lie on a few directions, objects in the middle."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for rows, columns in ((6, 8), (5, 5)):
        grid = 0.01 * torch.randn(rows, columns, 12, generator=generator)
        grid[2:4, 2:4, 0] += 5 + torch.rand(2, 2, generator=generator)
        grid[..., 1] += torch.rand(rows, columns, generator=generator)
        images.append(grid)
    return images


def test_colours_are_the_principal_components_of_all_patches_together():
    found = np.concatenate([colours.reshape(-1, 3) for colours in pca_maps.pca_maps(grids())])
    values = np.concatenate([grid.flatten(0, 1).double().numpy() for grid in grids()])
    left, sizes, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    for number in range(3):
        component = left[:, number] * sizes[number]
        low, high = np.quantile(component, [0.01, 0.99])
        expected = np.clip((component - low) / (high - low), 0, 1)
        difference = min(np.abs(found[:, number] - one).max() for one in (expected, 1 - expected))
        assert difference < 1e-4


def test_the_foreground_is_what_is_rare_at_the_edges():
    maps = pca_maps.pca_maps(grids(), foreground_threshold=0.5)
    assert [colours.shape for colours in maps] == [(6, 8, 3), (5, 5, 3)]
    is_shown = [colours.any(axis=-1) for colours in maps]
    for shown in is_shown:
        inside = np.zeros_like(shown)
        inside[2:4, 2:4] = True
        assert not (shown & ~inside).any() and shown.sum() >= 3  # black is also the lowest of all components
    inverted = pca_maps.pca_maps(grids(), foreground_threshold=0.5, invert_foreground=True)
    assert not inverted[0][2:4, 2:4].any() and inverted[0].any(axis=-1).sum() > 30


def test_too_few_patches_are_refused():
    with pytest.raises(ConfigError, match="leaves 2 of 73 patches; choose one nearer to the middle"):
        grid = grids()
        grid[1][2:4, 2:4, 0] = grid[0][2:4, 3, 0] = 0
        pca_maps.pca_maps(grid, foreground_threshold=0.5)
    with pytest.raises(ConfigError, match="the images have 2 patches altogether"):
        pca_maps.pca_maps([torch.rand(1, 2, 5)])


def test_equal_patches_give_a_map():
    (colours,) = pca_maps.pca_maps([torch.ones(3, 3, 5)])
    assert np.isfinite(colours).all()


def test_pca_command_draws(folder, capsys):
    output = folder / "new" / "maps.png"
    assert pca_maps.main(arguments(folder, "--num-images", "3", "--image-size", "32", "--output", str(output))) == 0
    assert capsys.readouterr().out == f"written: {output}, 3 images of {folder}/photos\n"
    width, height = size_of(output)
    assert width < 1000 and height < 1200
    assert pca_maps.main(arguments(folder, "--image-size", "64", "--foreground-threshold", "0.4")) == 0
    assert size_of(folder / "out" / "pca_maps.png")[1] < 2400


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-size", "30"], "--image-size 30 is not a multiple of student.patch_size=4; use 28 or 32"),
        (["--num-images", "100"], "--num-images 100: must be 1 to 40"),
        (["--output", "maps.jpg"], "--output maps.jpg: must be a .png file"),
        (["--foreground-threshold", "1.5"], "--foreground-threshold 1.5: must be above 0 and below 1"),
        (["--invert-foreground"], "--invert-foreground: needs --foreground-threshold T"),
        (["student.arch=resnet18"], "student.arch=resnet18: pca_maps.py needs patches, which a ResNet has not"),
    ],
)
def test_pca_command_refuses(folder, capsys, more, message):
    args = arguments(folder, *more)
    if "resnet" in more[0]:
        args = [text for text in args if text not in MODEL] + ["ibot.loss_weight=0"]
    assert fails_with(capsys, pca_maps, args) == f"error: {message}"


# attention


@pytest.mark.parametrize("kind", [{}, {"pos_embed_type": "rope", "pos_embed_rope_dtype": "fp32"}])
def test_attention_maps_leave_class_token_and_registers_out(kind):
    model = tiny(num_register_tokens=3, **kind)
    image = torch.randn(3, 16, 24)
    maps = attention_maps.attention_maps(model, image, device=CPU, dtype=torch.float32)
    weights = model.get_class_attention(image[None])[0].detach()
    assert maps.shape == (3, 4, 6)
    np.testing.assert_allclose(maps.reshape(3, -1), weights[:, 4:], rtol=1e-6)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)) + weights[:, :4].sum(dim=1).numpy(), 1, rtol=1e-5)


def test_attention_command_draws(folder, capsys):
    assert attention_maps.main(arguments(folder, "--num-images", "2", "--block", "0")) == 0
    assert size_of(folder / "out" / "attention_maps.png")[0] < 1300
    line = fails_with(capsys, attention_maps, arguments(folder, "--block", "2"))
    assert line == "error: --block 2: the backbone has blocks 0 to 1"


# t-SNE


def feature_set(count=40, **more):
    generator = torch.Generator().manual_seed(0)
    targets = np.arange(count) % 2
    values = torch.randn(count, 8, generator=generator) + 8 * torch.from_numpy(targets)[:, None]
    fixed = {"name": "S", "values": values, "targets": targets, "places": np.arange(count)}
    return FeatureSet(**fixed | {"columns": {"plate": np.array(["p1", "p2", "p3", "p4"] * (count // 4))}} | more)


def test_tsne_keeps_neighbours_together_and_repeats(tmp_path):
    found = tsne.visualize_features_tsne(feature_set(), tmp_path / "new" / "tsne.png")
    assert size_of(tmp_path / "new" / "tsne.png") == (1080, 840)
    distances = np.linalg.norm(found[:, None] - found[None], axis=-1) + np.eye(40) * 1e9
    assert (distances.argmin(axis=1) % 2 == np.arange(40) % 2).all()
    again = tsne.visualize_features_tsne(feature_set().values.numpy(), tmp_path / "b.png", colour_by=range(40))
    np.testing.assert_array_equal(found, again)


def test_tsne_says_what_it_shows(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tsne, "draw_scatter", lambda path, points, **more: seen.append((len(points), more)))
    tsne.visualize_features_tsne(feature_set(), tmp_path / "a.png", colour_by="plate", num_images=20, seed=3)
    (count, more), *_ = seen
    assert count == 20 and more["column_name"] == "plate" and set(more["column"]) <= {"p1", "p2", "p3", "p4"}
    assert more["title"] == "S\nt-SNE of 20 of 40 images, by hash, perplexity 6.33333, seed 3"
    unknown = feature_set(targets=np.full(40, -1))
    tsne.visualize_features_tsne(unknown, tmp_path / "a.png")
    assert seen[1][1]["column"] is None
    some = feature_set(targets=np.where(np.arange(40) < 8, -1, np.arange(40) % 2), class_names=("cat", "dog"))
    tsne.visualize_features_tsne(some, tmp_path / "a.png")
    assert seen[2][1]["column"].tolist()[6:12] == ["no label", "no label", "cat", "dog", "cat", "dog"]


@pytest.mark.parametrize("column", [np.arange(40.0), np.arange(40).astype(str), np.array(["_a$b"] * 40)])
def test_any_column_can_be_drawn(tmp_path, column):
    features = feature_set(columns={"c": column})
    tsne.visualize_features_tsne(features, tmp_path / "a.png", colour_by="c")
    assert size_of(tmp_path / "a.png") == (1080, 840)


def test_tsne_refuses(tmp_path):
    with pytest.raises(ConfigError, match="--colour-by well: S has no such column; it has: label, plate"):
        tsne.visualize_features_tsne(feature_set(), tmp_path / "a.png", colour_by="well")
    with pytest.raises(ConfigError, match="--colour-by label: S has no labels"):
        unknown = feature_set(targets=np.full(40, -1))
        tsne.visualize_features_tsne(unknown, tmp_path / "a.png", colour_by="label")
    with pytest.raises(DatasetError, match="t-SNE needs at least 4 images and there are 3"):
        tsne.visualize_features_tsne(feature_set().take([0, 1, 2]), tmp_path / "a.png")
    with pytest.raises(DatasetError, match="all features are equal: the backbone has collapsed"):
        tsne.visualize_features_tsne(torch.ones(9, 4), tmp_path / "a.png")
    with pytest.raises(ValueError, match="must be one value for each of the 40 rows"):
        tsne.visualize_features_tsne(feature_set().values, tmp_path / "a.png", colour_by="plate")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        tsne.visualize_features_tsne(feature_set(), tmp_path / "file" / "a.png")


def test_tsne_command_takes_kept_features(folder, capsys):
    args = arguments(folder, "--perplexity", "5", "--color-by", "label")
    assert tsne.main(args) == 0
    out, err = capsys.readouterr()
    written = f"written: {folder}/out/tsne.png, 7 of 7 images of ImageFolder:root={folder}/photos\n"
    assert out == written and "are computed" in err
    assert size_of(folder / "out" / "tsne.png") == (1080, 840)
    assert tsne.main(args) == 0
    out, err = capsys.readouterr()
    assert out == written and "are taken from" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--perplexity", "1"], "--perplexity 1: must be above 1"),
        (["--num-images", "3"], "--num-images 3: must be at least 4"),
        (["--seed", "-1"], "--seed -1: must be 0 to 4294967295"),
        (["--pool", "patches"], "--pool patches: t-SNE takes one vector for each image; choose cls, mean or lastN"),
        (["--output", "a.pdf"], "--output a.pdf: must be a .png file"),
    ],
)
def test_tsne_command_refuses(folder, capsys, more, message):
    assert fails_with(capsys, tsne, arguments(folder, *more)) == f"error: {message}"
