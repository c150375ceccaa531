"""Features are computed once, and anew when anything that they depend on has changed."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.dist import run_distributed
from support.images import write_photos

from dinov2.configs import load_config
from dinov2.errors import CheckpointError, ConfigError, DatasetError
from dinov2.eval import feature_blocks
from dinov2.eval.build import load_frozen_backbone, open_eval_dataset
from dinov2.eval.feature_cache import cached_features
from dinov2.eval.feature_files import index_path, open_feature_set, why_unusable
from dinov2.models import build_model

MODEL = ["student.arch=vit_tiny", "student.depth=2", "student.embed_dim=48", "student.patch_size=4"]
SIZES = ["crops.global_crops_size=16", "crops.local_crops_size=8", "compute_precision.device=cpu"]
CPU = torch.device("cpu")
NUM_PHOTOS = 75
BLOCK = 32


def save_weights(path, *, seed=0, scale=1.0, **options):
    model = build_model("vit_tiny", depth=2, embed_dim=48, patch_size=4, img_size=16, init_values=1e-5)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.norm.weight.mul_(scale)
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}}, path)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(feature_blocks, "_ROWS_OF_A_BLOCK", BLOCK)


@pytest.fixture
def folder(tmp_path):
    save_weights(tmp_path / "weights.pth")
    write_photos(tmp_path / "photos", NUM_PHOTOS, num_classes=3, size=(24, 20))
    return tmp_path


def features(folder, *, into="features", settings=(), dataset=None, pool="cls", dtype="fp32"):
    cfg = load_config(None, [*MODEL, *SIZES, "train.num_workers=0", f"train.output_dir={folder}", *settings])
    return cached_features(
        cfg,
        weights=str(folder / "weights.pth"),
        checkpoint_key="teacher",
        dataset=dataset or f"ImageFolder:root={folder}/photos",
        pool=pool,
        dtype=dtype,
        features_dir=folder / into,
        device=CPU,
    )


def files_of(folder, into="features"):
    """Content of the kept files by kind; the name of the folder does not show in them."""
    return {path.suffix: path.read_bytes() for path in (folder / into).iterdir() if path.suffix != ".lock"}


def messages(caplog):
    """Sentences about features, without the seconds, and forgotten."""
    found = [r.getMessage() for r in caplog.records if r.name.startswith("dinov2.eval.feature") and "=" not in r.msg]
    caplog.clear()
    return found


def test_features_are_those_of_the_backbone_in_the_order_of_the_dataset(folder):
    found = features(folder)
    cfg = load_config(None, [*MODEL, *SIZES, f"train.output_dir={folder}"])
    dataset = open_eval_dataset(cfg, found.name).dataset
    backbone = load_frozen_backbone(cfg, str(folder / "weights.pth"), checkpoint_key="teacher", device=CPU)
    with torch.no_grad():
        wanted = torch.cat([backbone(dataset[index][0][None]) for index in range(NUM_PHOTOS)])
    torch.testing.assert_close(found.values, wanted, rtol=1e-5, atol=1e-6)  # float32 sums in another order
    assert found.targets.tolist() == dataset.get_targets().tolist()
    assert found.columns["path"].tolist() == [dataset.path(index) for index in range(NUM_PHOTOS)]
    assert found.places.tolist() == list(range(NUM_PHOTOS)) and found.class_names == ("class_0", "class_1", "class_2")
    assert (found.pool, found.checkpoint_key, found.weights) == ("cls", "teacher", str(folder / "weights.pth"))


@pytest.mark.parametrize("settings", [["evaluation.knn.batch_size=7"], ["train.num_workers=2"]])
def test_neither_batch_size_nor_workers_change_a_byte(folder, settings):
    features(folder)
    features(folder, into="other", settings=settings)
    assert files_of(folder) == files_of(folder, "other")


def on_ranks(folder, num_processes):
    feature_blocks._ROWS_OF_A_BLOCK = BLOCK
    return features(Path(folder), into=f"on_{num_processes}").values.clone()


@pytest.mark.integration
@pytest.mark.dist
def test_the_number_of_processes_does_not_change_a_byte(folder):
    alone = features(folder)
    for num_processes in (2, 3):
        args = {"folder": str(folder), "num_processes": num_processes}
        for values in run_distributed(on_ranks, num_processes=num_processes, args=args):
            assert torch.equal(values, alone.values)
        assert files_of(folder) == files_of(folder, f"on_{num_processes}")


def test_another_order_of_the_files_gives_the_same_features(folder):
    before = features(folder)
    for number, path in enumerate(sorted((folder / "photos").rglob("*.jpg"))):
        path.rename(path.with_name(f"{(number * 37) % NUM_PHOTOS:04d}_{path.name}"))
    after = features(folder)
    name = [Path(path).name[5:] for path in after.columns["path"]]
    rows = {Path(path).name: row for row, path in enumerate(before.columns["path"])}
    order = [rows[text] for text in name]
    assert order != sorted(order) and torch.equal(after.values, before.values[order])


def test_kept_features_are_used_again_and_no_image_is_read(folder, caplog, monkeypatch):
    before = features(folder)
    monkeypatch.setattr(feature_blocks, "load_batches", None)
    with caplog.at_level(logging.INFO):
        after = features(folder)
    assert torch.equal(before.values, after.values) and before.digest == after.digest
    (path,) = (folder / "features").glob("*.safetensors")
    assert messages(caplog) == [f"features of {before.name} are taken from {path}"]


def change_weights(folder):
    save_weights(folder / "weights.pth", seed=1)
    return f"the weights of {folder}/weights.pth have changed"


def change_image(folder):
    path = next((folder / "photos").rglob("*.jpg"))
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000_000))
    return "its images, labels or columns have changed"


def change_label(folder):
    path = next((folder / "photos" / "class_0").iterdir())
    path.rename(folder / "photos" / "class_1" / path.name)
    return "its images, labels or columns have changed"


def change_size(folder):
    return "settings of the network or of the preprocessing are different"


def change_limit(folder):
    return "its images, labels or columns have changed"


@pytest.mark.parametrize(
    "change, settings",
    [
        (change_weights, []),
        (change_image, []),
        (change_label, []),
        (change_size, ["evaluation.knn.image_size_px=24"]),
        (change_size, ["evaluation.knn.resize_ratio=1.5"]),
        (change_limit, ["data.max_image_pixels=100000"]),
    ],
)
def test_stale_features_are_not_used_and_the_log_says_why(folder, caplog, change, settings):
    before = features(folder)
    (path,) = (folder / "features").glob("*.safetensors")
    reason = change(folder)
    with caplog.at_level(logging.INFO):
        after = features(folder, settings=settings)
    assert messages(caplog) == [
        f"features of {before.name} are computed: those of {path.name} are not used, because {reason}"
    ]
    assert after.digest != before.digest and len(list((folder / "features").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("kind", ["flipped", "cut", "no index", "broken index", "other label"])
def test_damaged_features_are_not_used(folder, caplog, kind):
    before = features(folder).values.clone()
    (path,) = (folder / "features").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[-100] ^= 1
        path.write_bytes(content)
        reason = "its checksum is wrong"
    elif kind == "cut":
        path.write_bytes(content[:-1])
        reason = f"it has {len(content) - 1} bytes instead of {len(content)}"
    elif kind == "no index":
        index_path(path).unlink()
        reason = "No such file or directory"
    elif kind == "other label":
        index = json.loads(index_path(path).read_text())
        index["columns"]["path"]["values"][3] = "another"
        index_path(path).write_text(json.dumps(index))
        reason = "its checksum is wrong"
    else:
        index_path(path).write_text("{")
        reason = "its index cannot be read (JSONDecodeError)"
    with caplog.at_level(logging.INFO):
        after = features(folder)
    assert messages(caplog)[0] == f"features of {after.name} are computed: {path.name} is not used: {reason}"
    assert torch.equal(after.values, before) and why_unusable(path) is None


def test_a_killed_run_goes_on_where_it_was(folder, caplog, monkeypatch):
    features(folder)
    write = feature_blocks.write_block

    def killed(path, tensors):
        if path.name == "block_000002.bin":
            raise KeyboardInterrupt
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(feature_blocks, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            features(folder, into="killed")
    kept = sorted((folder / "killed").glob("*.partial/*"))
    assert [path.name for path in kept] == ["block_000000.bin", "block_000001.bin"]
    kept[1].write_bytes(kept[1].read_bytes()[:-9])  # a block that is damaged is computed again
    read = []
    monkeypatch.setattr(feature_blocks, "write_block", lambda path, t: (read.append(path.name), write(path, t)))
    with caplog.at_level(logging.INFO):
        features(folder, into="killed")
    assert read == ["block_000001.bin", "block_000002.bin"]
    assert "1 of 3 blocks of features are there from an earlier run" in messages(caplog)
    assert files_of(folder) == files_of(folder, "killed")


def test_folders_whose_names_are_no_utf8(folder, caplog):
    before = features(folder).values.clone()
    odd = (folder / "photos").rename(folder / "photos\udce9")
    with caplog.at_level(logging.CRITICAL, logger="dinov2"):  # pytest's report of the log could not be sent otherwise
        found = features(folder, dataset=f"ImageFolder:root={odd}")
    assert torch.equal(found.values, before) and found.columns["path"][0].startswith(str(odd))


def test_unreadable_images(folder, caplog):
    whole = features(folder).values.clone()
    paths = sorted((folder / "photos").rglob("*.jpg"))
    for place in (0, 40):
        paths[place].write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"image 0 \(.*photo_0000.jpg\) cannot be read"):
        features(folder)
    with caplog.at_level(logging.WARNING):
        found = features(folder, settings=["train.on_bad_image=skip"])
    assert messages(caplog)[-1] == (f"{found.name}: 2 images that cannot be read are left out; the first: {paths[0]}")
    kept = [place for place in range(NUM_PHOTOS) if place not in (0, 40)]
    assert found.places.tolist() == kept and torch.equal(found.values, whole[kept])
    assert len(found.columns["path"]) == len(found) == NUM_PHOTOS - 2


def test_numbers_that_cannot_be_kept(folder):
    save_weights(folder / "weights.pth", scale=1e5)
    with pytest.raises(ConfigError) as caught:
        features(folder, dtype="fp16")
    first = sorted((folder / "photos").rglob("*.jpg"))[0]
    assert str(caught.value).startswith(f"the features of {first}, ")
    assert "are too large for fp16 (up to " in str(caught.value)
    assert str(caught.value).endswith("and fp16 ends at 65504); keep them as bf16 or fp32 (--features-dtype)")
    assert features(folder, dtype="bf16").values.dtype == torch.bfloat16
    save_weights(folder / "weights.pth", scale=3e38)
    with pytest.raises(CheckpointError, match="photo_0000.jpg.* and 29 more of the same batch hold NaN or infinity"):
        features(folder, settings=["evaluation.knn.batch_size=32"])


@pytest.mark.parametrize("pool, width", [("mean", 48), ("cls+mean", 96), ("last2+mean", 144), ("last2", 96)])
def test_pools_hold_those_that_are_parts_of_them(folder, pool, width):
    found = features(folder, pool=pool)
    assert found.values.shape == (NUM_PHOTOS, width) and found.pool == pool
    part = "mean" if "mean" in pool else "cls"
    assert torch.equal(found.select(part).values, features(folder, pool=part).values)


def test_patches(folder):
    found = features(folder, pool="patches", dtype="fp16")
    assert found.values.shape == (NUM_PHOTOS, 16, 48) and found.values.dtype == torch.float16
    mean = features(folder, pool="mean").values
    # 2^-11: half a step of float16
    torch.testing.assert_close(found.select("mean").values.float(), mean, rtol=2e-3, atol=2e-3)


def test_sets_without_files_labels_or_columns(folder):
    found = features(folder, dataset="Digits:split=VAL")
    assert len(found) == 599 and found.columns["path"][0].startswith("digit ")
    shutil.move(folder / "photos" / "class_0", folder / "flat")
    flat = features(folder, dataset=f"ImageFolder:root={folder}/flat")
    assert set(flat.targets.tolist()) == {-1} and flat.class_names == ()


def test_files_are_read_without_the_library(folder):
    found = features(folder)
    (path,) = (folder / "features").glob("*.safetensors")
    index = json.loads(index_path(path).read_text())
    assert index["columns"]["path"]["values"] == found.columns["path"].tolist()
    assert index["targets"] == found.targets.tolist() and set(index["digests"]) == {
        "weights",
        "dataset",
        "preprocessing",
        "format",
    }
    again = open_feature_set(path)
    assert torch.equal(again.values, found.values) and np.array_equal(again.targets, found.targets)
    with pytest.raises(DatasetError, match="no features can be read there"):
        open_feature_set(folder / "none.safetensors")


def test_wrong_settings(folder):
    with pytest.raises(ConfigError, match=r"pool 'clss': must be one of cls, mean, cls\+mean, patches, lastN"):
        features(folder, pool="clss")
    with pytest.raises(ConfigError, match="pool 'last3': the backbone has only 2 blocks"):
        features(folder, pool="last3")
    (folder / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written|cannot be made"):
        features(folder, into="file")


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean", "last2"])
def test_a_smaller_pool_is_cut_out_of_a_larger_one(folder, caplog, pool):
    alone = features(folder, into="alone", pool=pool)
    features(folder, pool="last2+mean")
    with caplog.at_level(logging.INFO):
        found = features(folder, pool=pool)
    assert f"the pool {pool} cut out" in caplog.text and "are computed" not in caplog.text
    assert torch.equal(found.values, alone.values)
    assert (found.pool, found.digest) == (pool, alone.digest)


def test_larger_pools_of_other_numbers_or_other_images_are_not_cut(folder, caplog):
    features(folder, pool="cls+mean", dtype="fp16")
    features(folder, pool="cls+mean", settings=["evaluation.knn.resize_ratio=1.0"])
    features(folder, pool="patches")
    with caplog.at_level(logging.INFO):
        features(folder)
    assert "cut out" not in caplog.text and "are computed" in caplog.text


def test_a_damaged_larger_pool_is_not_cut(folder, caplog):
    features(folder, pool="cls+mean")
    path = next((folder / "features").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.INFO):
        features(folder)
    assert f"{path.name} is not used: it has" in caplog.text
