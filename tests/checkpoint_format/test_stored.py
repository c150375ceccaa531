"""Whole checkpoints read without their ranks: rows put together, damage of every kind found, older formats read."""

import io
import os
import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from dinov2 import checkpoint_format as files
from dinov2.checkpoint_format import StoredCheckpoint
from dinov2.errors import CheckpointError
from dinov2.run.checkpoint_verify import verify

NAME = "model_0000003"
VERSION_1 = Path(__file__).parent.parent / "data" / "checkpoint_v1"  # by the first release, FULL_SHARD on 2 processes
WEIGHT = torch.randn(300_000, 3, generator=torch.Generator().manual_seed(0))  # more than one block a rank


def data_of(rank, world_size=2):
    """What rank files hold: a split weight, and tensors that stand in the second file alone."""
    num_rows = len(WEIGHT) // world_size
    place = {"global_shape": list(WEIGHT.shape), "offset": [rank * num_rows, 0]}
    rows = WEIGHT[rank * num_rows : (rank + 1) * num_rows].clone()
    moment = "checkpointables/optimizer/state/weight/exp_avg"
    data = {
        "rank": rank,
        "world_size": world_size,
        "model": {"weight": rows},
        "layout": {"model/weight": place, moment: place},
        "checkpointables": {
            "optimizer": {"state": {"weight": {"exp_avg": rows * 2, "kind": "x"}}, "param_groups": [{"lr": 0.1}]},
            "rng": {"torch": torch.tensor([rank])},
        },
        "extra": {"iteration": 3, "samples_seen": 36},
        "config": "{}",
    }
    if rank == 1:
        data["model"] |= {"bias": torch.arange(3.0), "scalar": torch.tensor(7), "none": torch.zeros(0, 4)}
        data["checkpointables"]["optimizer"]["state"]["weight"]["step"] = torch.tensor(5.0)
    return data


def write(folder, contents=None):
    contents = contents or [data_of(0), data_of(1)]
    records = {}
    for rank, data in enumerate(contents):
        records[files.rank_file_name(NAME, rank)] = files.write_rank_file(folder, name=NAME, rank=rank, data=data)
        files.publish_rank_file(folder, name=NAME, rank=rank)
    manifest = files.Manifest(
        name=NAME, iteration=3, world_size=len(contents), sharding_strategy="X", config_digest="", files=records
    )
    files.write_manifest(folder, manifest)
    return manifest


def refusal(folder):
    with pytest.raises(files.DamagedCheckpointError) as error:
        StoredCheckpoint.open(folder, NAME)
    return str(error.value)


def change_byte(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def test_rows_of_all_ranks_make_whole_tensors(tmp_path):
    write(tmp_path)
    stored = StoredCheckpoint.open(tmp_path, NAME)
    assert list(stored.model) == ["weight", "bias", "scalar", "none"]
    weight = stored.model["weight"]
    assert weight.global_shape == (300_000, 3) and weight.dtype == torch.float32 and len(weight.pieces) == 2
    assert torch.equal(weight.read_all(), WEIGHT)
    for first_row, num_rows in ((0, 1), (149_999, 2), (150_000, 3), (299_999, 1), (20, 0), (300_000, 0)):
        rows = weight.read(first_row, num_rows)
        assert rows.shape == (num_rows, 3) and torch.equal(rows, WEIGHT[first_row : first_row + num_rows])
    assert stored.model["scalar"].read_all() == 7 and stored.model["none"].read_all().shape == (0, 4)
    state = stored.optimizer["state"]["weight"]
    assert torch.equal(state["exp_avg"].read_all(), WEIGHT * 2)
    assert state["step"].read_all() == 5 and state["kind"] == "x"
    assert stored.optimizer["param_groups"] == [{"lr": 0.1}] and stored.optimizer_state("other") == {}
    assert stored.rank_values(1) == {"rng": {"torch": torch.tensor([1])}}
    assert stored.extra == {"iteration": 3, "samples_seen": 36} and stored.checkpointable_names == ["optimizer", "rng"]
    assert verify(tmp_path, NAME)[1] == []


def test_any_changed_byte_is_found(tmp_path):
    write(tmp_path)
    path = tmp_path / f"{NAME}.rank_1.pth"
    size = path.stat().st_size
    ends = [*range(80), *range(size - 80, size)]  # headers, padding and the directory
    for position in [*ends, *random.Random(0).sample(range(size), 60)]:
        change_byte(path, position)
        problems = verify(tmp_path, NAME)[1]
        assert len(problems) == 1 and problems[0].startswith(f"{NAME}.rank_1.pth"), position
        change_byte(path, position)
    assert verify(tmp_path, NAME)[1] == []


def test_a_slice_is_verified_and_the_rest_of_the_file_not(tmp_path):
    write(tmp_path)
    path = tmp_path / f"{NAME}.rank_1.pth"
    position = path.read_bytes().index(WEIGHT[280_000:280_010].numpy().tobytes())
    change_byte(path, position)
    weight = StoredCheckpoint.open(tmp_path, NAME).model["weight"]
    assert torch.equal(weight.read(0, 160_000), WEIGHT[:160_000])
    block = position // files.BLOCK_BYTES
    with pytest.raises(files.DamagedCheckpointError) as error:
        weight.read(280_000, 1)
    assert str(error.value) == (
        f"{NAME}.rank_1.pth: bytes {block << 20} to {((block + 1) << 20) - 1} do not match their checksum"
    )


def test_missing_truncated_and_swapped_files_are_named(tmp_path):
    equal = [data_of(0), data_of(1) | {"model": data_of(0)["model"], "layout": data_of(0)["layout"]}]
    equal[1]["checkpointables"]["optimizer"]["state"]["weight"].pop("step")
    manifest = write(tmp_path, equal)
    first, second = (tmp_path / file for file in manifest.files)
    first.rename(tmp_path / "aside"), second.rename(first), (tmp_path / "aside").rename(second)
    assert first.stat().st_size == second.stat().st_size
    assert refusal(tmp_path) == f"{first.name} holds what was written as {second.name}"
    write(tmp_path)
    os.truncate(first, 1000)
    assert (
        refusal(tmp_path)
        == f"{first.name} has 1000 bytes but {write(tmp_path).files[first.name].size_bytes} were written"
    )
    first.unlink()
    assert refusal(tmp_path) == f"{NAME}: 1 of 2 rank files found, {first.name} is missing"
    assert verify(tmp_path, NAME)[1] == [refusal(tmp_path)]


def test_a_file_of_another_checkpoint_is_refused(tmp_path):
    write(tmp_path, [data_of(0), data_of(0)])
    assert refusal(tmp_path) == f"{NAME}.rank_1.pth is another checkpoint's: it holds rank 0 of 2 after iteration 3"
    write(tmp_path, [data_of(0), data_of(1) | {"extra": {"iteration": 9}}])
    assert refusal(tmp_path) == f"{NAME}.rank_1.pth is another checkpoint's: it holds rank 1 of 2 after iteration 9"
    write(tmp_path, [data_of(0), {key: value for key, value in data_of(1).items() if key != "layout"}])
    assert refusal(tmp_path) == f"{NAME}.rank_1.pth has no layout"


@pytest.mark.parametrize(
    "place", [{"global_shape": [10**15, 3], "offset": [0, 0]}, {"global_shape": [8, 3], "offset": [5, 0]}]
)
def test_parts_that_do_not_make_the_whole_are_refused(tmp_path, place):
    contents = [data_of(0), data_of(1)]
    for data in contents:
        data["layout"]["model/weight"] = place
    write(tmp_path, contents)
    assert refusal(tmp_path) == f"{NAME}: the parts of model/weight do not make the whole {place['global_shape']}"
    contents[0]["layout"]["model/weight"] = {"global_shape": [-1, 3], "offset": [0, 0]}
    write(tmp_path, contents)
    assert refusal(tmp_path) == "model/weight: its place [-1, 3] from [0, 0] is not one of rows"


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [data_of(0), data_of(1) | {"model": Malicious()}])
    assert refusal(tmp_path).startswith(f"{NAME}.rank_1.pth cannot be read: Weights only load failed")
    assert not (tmp_path / "executed").exists()


def test_strange_files_are_refused(tmp_path):
    def require_refused(make, reason):
        manifest = write(tmp_path, [data_of(0)])
        path = tmp_path / f"{NAME}.rank_0.pth"
        make(path)
        content = path.read_bytes()
        summed = io.BytesIO(content)
        blocks = tuple(zlib.crc32(block) for block in iter(lambda: summed.read(files.BLOCK_BYTES), b""))
        record = files.FileRecord(size_bytes=len(content), crc32=blocks)
        files.write_manifest(tmp_path, files.Manifest(**{**vars(manifest), "files": {path.name: record}}))
        assert refusal(tmp_path) == reason

    require_refused(
        lambda path: path.write_bytes(b"no zip"), f"{NAME}.rank_0.pth cannot be read: File is not a zip file"
    )
    require_refused(lambda path: torch.save([1], path), f"{NAME}.rank_0.pth holds no dict")
    wide = {"model": {"weight": torch.zeros(1).expand(10**9)}}
    require_refused(lambda path: torch.save(wide, path), f"{NAME}.rank_0.pth: model/weight is no plain tensor")


def test_version_1_is_read_and_verified(tmp_path):
    folder = shutil.copytree(VERSION_1, tmp_path / "run")
    name = "model_0000004"
    assert files.find_checkpoints(folder) == [name] and verify(folder, name)[1] == []
    stored = StoredCheckpoint.open(folder, name)
    assert stored.manifest.format_version == 1 and stored.config == '{"a": 1}'
    assert stored.extra == {"iteration": 4, "samples_seen": 60}
    expected = torch.arange(6.0).view(3, 2) * (1 - 0.1 * 0.01) - 0.1  # one step of AdamW with gradients of 1
    torch.testing.assert_close(stored.model["student.weight"].read_all(), expected)
    assert stored.model["steps"].read_all() == 7
    state = stored.optimizer["state"]["student.weight"]
    assert state["exp_avg"].global_shape == (3, 2) and torch.allclose(state["exp_avg"].read_all(), torch.tensor(0.1))
    assert state["step"].read_all() == 1
    path = folder / f"{name}.rank_1.pth"
    position = path.read_bytes().index(stored.model["student.weight"].read(2, 1).numpy().tobytes())
    change_byte(path, position)
    damaged = StoredCheckpoint.open(folder, name)
    assert torch.equal(damaged.model["student.weight"].read(0, 2), stored.model["student.weight"].read(0, 2))
    with pytest.raises(CheckpointError) as error:
        damaged.model["student.weight"].read_all()
    assert str(error.value) == f"{name}.rank_1.pth: model/student.weight does not match its checksum"
    assert verify(folder, name)[1] == [str(error.value)]
