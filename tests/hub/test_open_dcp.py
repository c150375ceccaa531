"""DINOv3's checkpoint folders: written by torch.distributed.checkpoint, read without it; hostile ones are refused."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from support.dist import run_distributed
from support.toy_fsdp import make_toy
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from dinov2 import fsdp
from dinov2.errors import CheckpointError
from dinov2.hub.open_checkpoint import require_own_checkpoint
from dinov2.hub.open_weights import open_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

WEIGHT = torch.arange(12.0).reshape(4, 3)
RANKS = 4  # some parameters have fewer rows


def networks():
    return nn.ModuleDict({"student": make_toy(1), "teacher": make_toy(2), "centre": nn.LayerNorm(3)})


def save_as_dinov3_does(folder):
    """Write what DINOv3's save_checkpoint writes: `iteration`, `model`, `optimizer`."""
    model = networks()
    for name in ("student", "teacher"):
        for module in model[name].values():
            fsdp.shard(module, strategy="FULL_SHARD")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    optimizer.step()
    to_save = {"iteration": 9, "model": dcp_state.get_model_state_dict(model)}
    to_save["optimizer"] = dcp_state.get_optimizer_state_dict(model, optimizer)
    dcp.save(to_save, storage_writer=dcp.FileSystemWriter(folder))


@pytest.mark.dist
def test_a_checkpoint_of_several_processes_gives_whole_networks(tmp_path):
    folder = tmp_path / "ckpt" / "9"
    run_distributed(save_as_dinov3_does, num_processes=RANKS, args={"folder": str(folder)})
    weights = open_weights(folder)
    assert (weights.path, weights.kind) == (str(folder), "DCP folder (4 files)")
    assert weights.extra_keys == ("centre", "iteration", "optimizer")
    assert list(weights.states) == ["teacher", "student"]
    for network, state in weights.states.items():
        expected = networks()[network].state_dict()
        assert state.keys() == expected.keys()
        for name, stored in state.items():
            assert stored.shape == expected[name].shape and torch.equal(stored.read(), expected[name]), name


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint, of one process."""
    dcp.save({"model": {"teacher.backbone.weight": WEIGHT}, "iteration": 9}, checkpoint_id=tmp_path / "9", no_dist=True)
    return tmp_path / "9"


def sentence(path):
    with pytest.raises(CheckpointError) as caught:
        for state in open_weights(path).states.values():
            for stored in state.values():
                stored.read()
    return str(caught.value)


def change(folder, function):
    """Apply a function to the unpickled metadata, and write them again."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    function(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def place_of_weight(metadata):
    return next(place for index, place in metadata.storage_data.items() if index.fqn.endswith("weight"))


def test_the_networks_of_one_process_and_a_bare_state(folder, tmp_path):
    weights = open_weights(folder)
    assert (weights.kind, weights.extra_keys) == ("DCP folder (1 file)", ("iteration",))
    assert torch.equal(weights.states["teacher"]["backbone.weight"].read(), WEIGHT)
    dcp.save({"backbone.weight": WEIGHT, "optimizer": {"x": WEIGHT}}, checkpoint_id=tmp_path / "bare", no_dist=True)
    weights = open_weights(tmp_path / "bare")
    assert (list(weights.states[""]), weights.extra_keys) == (["backbone.weight"], ("optimizer",))
    dcp.save({"model": {"backbone.weight": WEIGHT}}, checkpoint_id=tmp_path / "eval", no_dist=True)
    assert list(open_weights(tmp_path / "eval").states) == ["model"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_other_types_views_and_numbers_alone(tmp_path, dtype):
    tensors = {"x": WEIGHT.to(dtype).T, "part": WEIGHT.to(dtype)[1:3, :2], "alone": WEIGHT[1, 1].to(dtype)}
    dcp.save({"model": tensors | {"none": torch.zeros(0, 3)}}, checkpoint_id=tmp_path / "9", no_dist=True)
    state = open_weights(tmp_path / "9").states["model"]
    assert state["none"].read().shape == (0, 3)
    for name, tensor in tensors.items():
        assert torch.equal(state[name].read(), tensor) and state[name].dtype == dtype


def test_parts_along_any_axis_are_put_together(folder):
    def split(metadata):
        entry = metadata.state_dict_metadata["model.teacher.backbone.weight"]
        entry.chunks = []
        for rows, columns in ((0, 0), (0, 2), (3, 0), (3, 2)):
            box = WEIGHT[rows : rows + (3 if rows == 0 else 1), columns : columns + (2 if columns == 0 else 1)]
            entry.chunks.append(ChunkStorageMetadata(torch.Size((rows, columns)), box.shape))
            content = io.BytesIO()
            torch.save(box.clone(), content)
            file = folder / f"__{rows}_{columns}.distcp"
            file.write_bytes(b"before" + content.getvalue() + b"behind")
            place = type(place_of_weight(metadata))(file.name, len(b"before"), len(content.getvalue()))
            metadata.storage_data[MetadataIndex(index.fqn, (rows, columns))] = place

    index = next(i for i in pickle.loads((folder / ".metadata").read_bytes()).storage_data if "weight" in i.fqn)
    change(folder, split)
    assert torch.equal(open_weights(folder).states["teacher"]["backbone.weight"].read(), WEIGHT)


class CreatesAFile:
    """What a hostile pickle does: reading it calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_before_it_does(folder, tmp_path):
    trap = tmp_path / "executed"
    pickle.loads(pickle.dumps(CreatesAFile(trap)))
    assert trap.exists()  # so the trap works
    trap.unlink()
    refused = "which no checkpoint of tensors needs; it is refused because reading it can run code"
    change(folder, lambda metadata: setattr(metadata, "planner_data", CreatesAFile(trap)))
    assert sentence(folder) == f"{folder}/.metadata: refers to pathlib.Path.touch, {refused}"
    for name in ("posix.system", "torch.load", "torch.hub.load", "torch.distributed.checkpoint.metadata.os"):
        module, _, attribute = name.rpartition(".")
        (folder / ".metadata").write_bytes(f"c{module}\n{attribute}\n(V{trap}\ntR.".encode())
        assert sentence(folder) == f"{folder}/.metadata: refers to {name}, {refused}"
    assert not trap.exists()


def test_a_tensor_that_would_run_code_is_refused(folder, tmp_path):
    trap = tmp_path / "executed"
    content = io.BytesIO()
    torch.save(CreatesAFile(trap), content)
    file = folder / "__0_0.distcp"
    file.write_bytes(content.getvalue())
    change(folder, lambda metadata: vars(place_of_weight(metadata)).update(offset=0, length=file.stat().st_size))
    assert sentence(folder) == damaged(file)
    assert not trap.exists()


def damaged(file):
    return f"{file}: what it holds of model.teacher.backbone.weight cannot be read, it is damaged; copy it again"


@pytest.mark.parametrize("name", ["../9/__0_0.distcp", "/etc/passwd", "..", "", "a\\b", "C:x"])
def test_files_elsewhere_are_not_opened(folder, name):
    change(folder, lambda metadata: setattr(place_of_weight(metadata), "relative_path", name))
    assert sentence(folder) == (
        f"{folder}/.metadata: names the file '{name}', which is not in its own folder; it is not opened"
    )


def test_missing_files(folder):
    change(folder, lambda metadata: setattr(place_of_weight(metadata), "relative_path", "__1_0.distcp"))
    assert sentence(folder) == f"{folder}: 1 of its 1 .distcp files are missing (__1_0.distcp); copy them too"
    (folder / ".metadata").unlink()
    assert sentence(folder) == (
        f"{folder}: has .distcp files but no .metadata, which is written last: the checkpoint is not complete; "
        "take an older one, or copy the folder again with its hidden files"
    )


def test_a_truncated_file(folder):
    file = folder / "__0_0.distcp"
    os.truncate(file, 100)
    assert sentence(folder) == f"{file}: ends within model.teacher.backbone.weight, it is truncated; copy it again"


@pytest.mark.parametrize("changes", [{"offset": 1}, {"length": 40}, {"offset": 0}])
def test_wrong_places(folder, changes):
    change(folder, lambda metadata: vars(place_of_weight(metadata)).update(changes))
    assert sentence(folder) == damaged(folder / "__0_0.distcp")


def test_a_tensor_larger_than_its_file_takes_no_memory(folder):
    def enlarge(metadata):
        entry = metadata.state_dict_metadata["model.teacher.backbone.weight"]
        entry.size = torch.Size((2**40, 3))
        entry.chunks[0].sizes = entry.size

    change(folder, enlarge)
    assert sentence(folder) == damaged(folder / "__0_0.distcp")


def test_a_compressed_part_takes_no_memory(folder):
    file = folder / "__0_0.distcp"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000))
    change(folder, lambda metadata: vars(place_of_weight(metadata)).update(offset=0, length=file.stat().st_size))
    assert sentence(folder) == damaged(file)
    change(folder, lambda metadata: setattr(place_of_weight(metadata), "transform_descriptors", ["stream.zstd"]))
    assert sentence(folder) == (
        f"{folder}: model.teacher.backbone.weight is stored compressed, which is not read; save it without extensions"
    )


@pytest.mark.parametrize("sizes", [(3, 3), (5, 3), (4, 2), (4,)])
def test_parts_that_do_not_make_the_whole(folder, sizes):
    def change_size(metadata):
        metadata.state_dict_metadata["model.teacher.backbone.weight"].size = torch.Size(sizes)

    change(folder, change_size)
    assert sentence(folder) == (
        f"{folder}: the parts of model.teacher.backbone.weight do not make the whole {list(sizes)}"
    )


def test_a_part_of_another_shape_or_type_is_noticed(folder):
    def change_type(metadata):
        metadata.state_dict_metadata["model.teacher.backbone.weight"].properties.dtype = torch.int32

    change(folder, change_type)
    assert sentence(folder) == damaged(folder / "__0_0.distcp")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04.",
        b"\x80\x04N.",
        b"\x80\x04}.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",  # bytes of 2**63
        b"\x80\x04Nr\xff\xff\xff\xff.",  # the highest place in memory that a pickle can name
        b"ctorch\nSize\n)\x81}b.",
        b"ctorch\nSize\n}b.",
    ],
)
def test_damaged_metadata(folder, content):
    (folder / ".metadata").write_bytes(content)
    assert sentence(folder) == f"{folder}/.metadata: is no sound list of tensors; copy the checkpoint's folder again"


@pytest.mark.parametrize("length", [1, 100, 500, -1])
def test_truncated_metadata(folder, length):
    file = folder / ".metadata"
    file.write_bytes(file.read_bytes()[:length])
    assert sentence(folder) == f"{file}: is no sound list of tensors; copy the checkpoint's folder again"


def test_metadata_of_wrong_values(folder):
    for changes in ({"offset": -1}, {"length": 2**70}, {"offset": "0"}, {"relative_path": None}):
        change(folder, lambda metadata, changes=changes: vars(place_of_weight(metadata)).update(changes))
        assert (
            sentence(folder) == f"{folder}/.metadata: is no sound list of tensors; copy the checkpoint's folder again"
        )


def test_no_network(tmp_path):
    dcp.save({"optimizer": {"x": WEIGHT}, "iteration": 9}, checkpoint_id=tmp_path / "9", no_dist=True)
    assert sentence(tmp_path / "9") == f"{tmp_path}/9: holds no tensors of a network, but iteration, optimizer"


def test_the_folder_of_a_run_points_to_its_newest_checkpoint(folder, tmp_path):
    (tmp_path / "11").mkdir()
    expected = f"is a folder of checkpoints of the official DINOv3 code; give one, the newest is {folder}"
    assert sentence(tmp_path) == f"{tmp_path}: {expected}"
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "9_keep")
    dcp.save({"model": {"x": WEIGHT}}, checkpoint_id=tmp_path / "run" / "ckpt" / "99", no_dist=True)
    assert sentence(tmp_path / "run").endswith(f"the newest is {tmp_path}/run/ckpt/99")
    assert open_weights(tmp_path / "9_keep").extra_keys == ("iteration",)


def test_it_is_not_the_whole_state_of_a_run_here(folder):
    with pytest.raises(CheckpointError) as caught:
        require_own_checkpoint(folder)
    assert str(caught.value) == (
        f"{folder}: is no checkpoint of a training run, at most its weights; "
        f"start a new run from them with student.pretrained_weights={folder}"
    )
