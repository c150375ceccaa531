"""Rank files and manifests on disk: round trip, verification, what is left after failures."""

import json
import resource
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from dinov2 import checkpoint_format as files
from dinov2.checkpoint_format import FileRecord
from dinov2.errors import CheckpointError

DATA = {
    "model": {
        "weight": torch.arange(6.0).view(2, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "step": torch.tensor(3),
    },
    "flags": {"mask": torch.tensor([True, False]), "none": torch.zeros(0, 4)},
    "betas": (0.9, 0.999),
    "lr": 1e-3,
    "names": ["a", "b"],
    "empty": {},
}


def write(folder, iteration, data=DATA, world_size=1):
    name = files.checkpoint_name(iteration)
    records = {}
    for rank in range(world_size):
        records[files.rank_file_name(name, rank)] = files.write_rank_file(folder, name=name, rank=rank, data=data)
        files.publish_rank_file(folder, name=name, rank=rank)
    manifest = files.Manifest(
        name=name,
        iteration=iteration,
        world_size=world_size,
        sharding_strategy="NO_SHARD",
        config_digest="abc",
        files=records,
    )
    files.write_manifest(folder, manifest)
    return name, manifest


@contextmanager
def full_disk(limit_bytes):
    """Let every file of this process end at `limit_bytes`, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_data_and_manifest_come_back(tmp_path):
    name, manifest = write(tmp_path, 12, world_size=2)
    assert name == "model_0000012" and files.iteration_of(name) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model_0000012.manifest.json",
        "model_0000012.rank_0.pth",
        "model_0000012.rank_1.pth",
    ]
    assert files.open_checkpoint(tmp_path, name) == manifest
    assert manifest.size_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.pth"))
    loaded = torch.load(tmp_path / "model_0000012.rank_1.pth", weights_only=True)
    assert loaded.keys() == DATA.keys()
    assert loaded["betas"] == (0.9, 0.999) and loaded["names"] == ["a", "b"] and loaded["empty"] == {}
    for group in ("model", "flags"):
        for key, tensor in DATA[group].items():
            assert loaded[group][key].dtype == tensor.dtype and torch.equal(loaded[group][key], tensor)


def test_incomplete_checkpoints_are_refused_with_the_reason(tmp_path):
    def reason(name):
        with pytest.raises(files.DamagedCheckpointError) as error:
            files.open_checkpoint(tmp_path, name)
        return str(error.value)

    assert reason("model_0000009") == (
        f"model_0000009: there is no model_0000009.manifest.json in {tmp_path}, so it is not complete"
    )
    name, _ = write(tmp_path, 1, world_size=3)
    assert files.has_manifest(tmp_path, name) and not files.has_manifest(tmp_path, "model_0000009")
    path = tmp_path / "model_0000001.rank_2.pth"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    assert reason(name) == f"model_0000001.rank_2.pth has {size - 10} bytes but {size} were written"
    path.unlink()
    assert reason(name) == "model_0000001: 2 of 3 rank files found, model_0000001.rank_2.pth is missing"
    (tmp_path / "model_0000001.manifest.json").write_text("{")
    assert reason(name).startswith("model_0000001.manifest.json cannot be read: ")


def test_another_format_version_is_refused(tmp_path):
    name, _ = write(tmp_path, 1)
    path = tmp_path / f"{name}.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 3}))
    with pytest.raises(CheckpointError) as error:
        files.open_checkpoint(tmp_path, name)
    assert str(error.value) == "model_0000001 has format version 3 but this program reads 1 to 2; use a newer one"
    assert not isinstance(error.value, files.DamagedCheckpointError)  # an older one is no replacement


def test_any_changed_byte_of_a_manifest_is_found(tmp_path):
    name, manifest = write(tmp_path, 1)
    path = tmp_path / f"{name}.manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match="model_0000001"):
            files.open_checkpoint(tmp_path, name)
    path.write_bytes(whole)
    assert files.open_checkpoint(tmp_path, name) == manifest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"world_size": 10**12}, "the files it lists are not those of 1000000000000 ranks"),
        ({"world_size": True}, "world_size is not a value of type int"),
        ({"files": {"../secret": ...}}, "the files it lists are not those of 1 ranks"),
        ({"files": {}}, "the files it lists are not those of 1 ranks"),
        (
            {"files": {"model_0000001.rank_0.pth": FileRecord(size_bytes=-1, crc32=())}},
            "a size is not a number of bytes",
        ),
        ({"block_bytes": 1}, "the checksums do not cover the files"),
        ({"block_bytes": 0}, "the checksums do not cover the files"),
        ({"name": "model_0000002"}, "the files it lists are not those of 1 ranks"),
    ],
)
def test_a_manifest_cannot_point_elsewhere(tmp_path, change, reason):
    name, manifest = write(tmp_path, 1)
    if "../secret" in change.get("files", {}):
        change = {"files": {"../secret": manifest.files["model_0000001.rank_0.pth"]}}
    changed = replace(manifest, **change)
    files.write_manifest(tmp_path, changed)
    if changed.name != name:
        (tmp_path / f"{changed.name}.manifest.json").replace(tmp_path / f"{name}.manifest.json")
    with pytest.raises(files.DamagedCheckpointError) as error:
        files.open_checkpoint(tmp_path, name)
    assert str(error.value) == f"model_0000001.manifest.json cannot be read: {reason}"


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    with full_disk(2000), pytest.raises(OSError, match="File too large"):
        files.write_rank_file(tmp_path, name="model_0000001", rank=0, data={"x": torch.zeros(10_000)})
    assert list(tmp_path.iterdir()) == []
    name, manifest = write(tmp_path, 2)
    with full_disk(20), pytest.raises(OSError, match="File too large"):
        files.write_manifest(tmp_path, manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.manifest.json", f"{name}.rank_0.pth"]
    assert files.open_checkpoint(tmp_path, name) == manifest


def test_only_numbered_checkpoints_with_a_manifest_are_found(tmp_path):
    assert files.find_checkpoints(tmp_path / "absent") == []
    for iteration in (20, 3, 12_345_678):
        write(tmp_path, iteration)
    (tmp_path / "model_0000005.rank_0.pth").touch()
    (tmp_path / "best.manifest.json").touch()
    assert files.find_checkpoints(tmp_path) == ["model_0000003", "model_0000020", "model_12345678"]


def test_leftovers_and_incomplete_ones_are_removed_and_nothing_else(tmp_path):
    write(tmp_path, 3)
    for name in (
        "model_0000007.rank_1.pth.tmp",
        "model_0000007.manifest.json.tmp",
        "last_checkpoint.rank_0.tmp",
        "model_0000002.rank_0.pth",
        "model_0000009.rank_0.pth",
        "notes.tmp",
        "model_best.rank_0.pth",
    ):
        (tmp_path / name).touch()
    (tmp_path / "last_checkpoint.rank_0").touch()
    (tmp_path / "last_checkpoint.rank_2").touch()
    files.remove_leftovers(tmp_path, num_ranks=2)
    files.remove_incomplete(tmp_path, before_iteration=9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint.rank_0",
        "model_0000003.manifest.json",
        "model_0000003.rank_0.pth",
        "model_0000009.rank_0.pth",
        "model_best.rank_0.pth",
        "notes.tmp",
    ]
    files.remove_incomplete(tmp_path)
    assert not (tmp_path / "model_0000009.rank_0.pth").exists()
    files.remove_checkpoint(tmp_path, "model_0000003")
    assert files.find_checkpoints(tmp_path) == []
    assert not (tmp_path / "model_0000003.rank_0.pth").exists()


@pytest.mark.parametrize(
    "path",
    [
        "run/model_0000003.rank_1.pth",
        "run/model_0000003.rank_{rank}.pth",
        "run/model_0000003.manifest.json",
        "run/model_0000003",
    ],
)
def test_every_way_to_name_a_checkpoint(path):
    folder, name = files.split_path(path)
    assert (str(folder), name) == ("run", "model_0000003")
    assert files.is_checkpoint_path(path)


def test_weights_are_no_checkpoint():
    assert not files.is_checkpoint_path("run/teacher_checkpoint.pth")
    assert not files.is_checkpoint_path("model_final.rank_0.safetensors")


def test_plain_data_owns_its_memory_and_refuses_what_cannot_be_read_back(tmp_path):
    wide = torch.zeros(1000)
    plain = files.to_plain(OrderedDict(part=wide[:3], pair=(1, [2.0, None])))
    assert type(plain) is dict and plain["pair"] == (1, [2.0, None])
    assert plain["part"].untyped_storage().nbytes() == 12
    with pytest.raises(TypeError) as error:
        files.to_plain({"rng": [1, {2}]})
    assert str(error.value) == "/rng/1 is a set; a checkpoint holds tensors, numbers, strings and lists"
