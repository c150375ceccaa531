"""Checkpoints of training runs: whole networks from any number of rank files, checked; the parents' are recognised."""

from pathlib import Path

import pytest
import torch
from support.dist import run_distributed
from support.toy_fsdp import make_toy
from torch import nn

from dinov2 import checkpoint_format, fsdp
from dinov2.errors import CheckpointError
from dinov2.hub.open_checkpoint import require_own_checkpoint
from dinov2.hub.open_weights import open_weights


def networks():
    """Student and teacher with parameters of 0 to 2 axes, shorter and longer than two ranks, and buffers."""
    return nn.ModuleDict({"student": make_toy(1), "teacher": make_toy(2), "centre": nn.LayerNorm(3)})


def save(folder, strategy="NO_SHARD", hybrid_shard_size=None, iteration=3):
    """Save a run of as many ranks as there are."""
    model = networks()
    for name in ("student", "teacher"):
        for module in model[name].values():
            fsdp.shard(module, strategy=strategy, hybrid_shard_size=hybrid_shard_size)
    optimizer = torch.optim.AdamW(model["centre"].parameters())
    checkpointer = fsdp.FSDPCheckpointer(model, folder, sharding_strategy=strategy, optimizer=optimizer)
    checkpointer.save(checkpoint_format.checkpoint_name(iteration), iteration=iteration)


def sentence(path):
    with pytest.raises(CheckpointError) as caught:
        open_weights(path)
    return str(caught.value)


def damage(path):
    """Say what is wrong with a small file, which is summed up as a whole."""
    return f"{path}: bytes 0 to {path.stat().st_size - 1} do not match their checksum"


def flip_byte(path, tensor):
    """Change one byte of a tensor inside a file."""
    whole = path.read_bytes()
    position = whole.index(tensor.detach().numpy().tobytes())
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])


def check_whole(path, *, num_ranks):
    weights = open_weights(path)
    kind = "training checkpoint (1 rank)" if num_ranks == 1 else f"training checkpoint ({num_ranks} ranks)"
    assert (weights.path, weights.kind, weights.config) == (str(path), kind, None)
    assert list(weights.states) == ["teacher", "student"]
    assert weights.extra_keys == ("centre", "optimizer", "iteration")
    for network, state in weights.states.items():
        expected = networks()[network].state_dict()
        assert state.keys() == expected.keys()
        for name, stored in state.items():
            assert (stored.shape, stored.dtype) == (expected[name].shape, expected[name].dtype), name
            assert torch.equal(stored.read(), expected[name]), name


@pytest.mark.parametrize(
    "name",
    ["model_0000003.rank_0.pth", "model_0000003.rank_{rank}.pth", "model_0000003.manifest.json", "model_0000003"],
)
def test_every_way_to_name_a_checkpoint_opens_it(tmp_path, name):
    save(str(tmp_path))
    check_whole(tmp_path / name, num_ranks=1)


RANKS = 4  # some parameters have fewer rows


def save_by_ranks(folder):
    """Save under every kind of sharding, and as the parents do, into folders of these names."""
    for strategy in ("FULL_SHARD", "NO_SHARD", "HYBRID_SHARD"):
        save(f"{folder}/{strategy}", strategy, hybrid_shard_size=2)
    save_as_the_parents_do(Path(folder) / "parents")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "parents").mkdir()
    run_distributed(save_by_ranks, num_processes=RANKS, args={"folder": str(folder)})
    return folder


@pytest.mark.dist
def test_rows_are_put_together_from_all_ranks_and_checked(saved):
    folder = saved / "FULL_SHARD"
    check_whole(folder / "model_0000003.rank_1.pth", num_ranks=RANKS)
    path = folder / "model_0000003.rank_2.pth"
    name = "teacher.backbone.blocks.0.linear.weight"
    flip_byte(path, torch.load(path, weights_only=True)["model"][name])
    assert sentence(folder / "model_0000003") == damage(path)
    path.unlink()
    assert sentence(folder / "model_0000003") == (
        f"{folder}/model_0000003: 3 of 4 rank files found, model_0000003.rank_2.pth is missing"
    )


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["NO_SHARD", "HYBRID_SHARD"])
def test_of_several_copies_the_first_is_read(saved, strategy):
    check_whole(saved / strategy / "model_0000003", num_ranks=RANKS)


def test_a_damaged_checkpoint_points_to_another(tmp_path):
    save(str(tmp_path)), save(str(tmp_path), iteration=7)
    path = tmp_path / "model_0000007.rank_0.pth"
    whole, size = path.read_bytes(), path.stat().st_size
    path.write_bytes(whole[:-1])
    assert sentence(path) == (f"{path} has {size - 1} bytes but {size} were written; the folder also has model_0000003")
    path.write_bytes(whole)
    (tmp_path / "model_0000007.manifest.json").unlink()
    assert sentence(tmp_path / "model_0000007") == (
        f"{tmp_path}/model_0000007: there is no model_0000007.manifest.json in {tmp_path}, so it is not complete; "
        "the folder also has model_0000003"
    )


def test_changed_contents_are_noticed_when_read(tmp_path):
    save(str(tmp_path))
    path = tmp_path / "model_0000003.rank_0.pth"
    flip_byte(path, networks()["teacher"]["head"].mlp.weight)
    assert sentence(path) == damage(path)


def test_parts_that_do_not_make_the_whole_are_refused(tmp_path):
    save(str(tmp_path))
    path = tmp_path / "model_0000003.rank_0.pth"
    data = torch.load(path, weights_only=True)
    name = "teacher.head.mlp.weight"
    data["layout"][f"model/{name}"]["global_shape"] = [8, 6]
    rewrite(tmp_path, data)
    assert sentence(path) == f"{tmp_path}/model_0000003: the parts of model/{name} do not make the whole [8, 6]"


def rewrite(folder, data):
    record = checkpoint_format.write_rank_file(folder, name="model_0000003", rank=0, data=data)
    checkpoint_format.publish_rank_file(folder, name="model_0000003", rank=0)
    manifest = checkpoint_format.Manifest(**MANIFEST, files={"model_0000003.rank_0.pth": record})
    checkpoint_format.write_manifest(folder, manifest)


MANIFEST = {
    "name": "model_0000003",
    "iteration": 3,
    "world_size": 1,
    "sharding_strategy": "NO_SHARD",
    "config_digest": "",
}


def test_a_rank_file_alone_is_refused(tmp_path):
    save(str(tmp_path))
    (tmp_path / "model_0000003.rank_0.pth").rename(tmp_path / "renamed.pth")
    assert sentence(tmp_path / "renamed.pth") == (
        f"{tmp_path}/renamed.pth: is one rank's part of a training checkpoint; "
        "give it under the name that it was saved with, beside its manifest and the other parts"
    )


def save_as_the_parents_do(folder):
    """Write what DINOv2's FSDPCheckpointer writes: local shards of FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType

    model = nn.ModuleDict({"teacher": nn.ModuleDict({"backbone": nn.Linear(4, 4)})})
    model["teacher"]["backbone"] = FullyShardedDataParallel(
        model["teacher"]["backbone"], sharding_strategy=ShardingStrategy.FULL_SHARD, device_id=torch.device("cpu")
    )
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
        state = model.state_dict()
    rank = torch.distributed.get_rank()
    torch.save({"model": state, "iteration": 11249}, Path(folder) / f"model_0011249.rank_{rank}.pth")


@pytest.mark.dist
def test_rank_files_of_the_official_code_point_to_its_teacher_file(saved):
    folder = saved / "parents"
    with pytest.raises(CheckpointError):
        require_own_checkpoint(folder / "model_0011249.rank_{rank}.pth")
    start = "is one rank's part of a checkpoint of the official DINOv2 code (FSDP), which cannot be read by itself; "
    for name in ("model_0011249.rank_1.pth", "model_0011249.rank_{rank}.pth", "model_0011249"):
        file = folder / (name if "rank_1" in name else "model_0011249.rank_0.pth")
        assert sentence(folder / name) == (
            f"{file}: {start}give the teacher that the same run has saved, "
            f"{folder}/eval/training_11249/teacher_checkpoint.pth"
        )
    (folder / "model_0011249.rank_0.pth").rename(folder / "model_final.rank_0.pth")
    assert sentence(folder / "model_final.rank_0.pth").endswith("/eval/training_N/teacher_checkpoint.pth")
    teacher = folder / "eval" / "training_12499" / "teacher_checkpoint.pth"
    teacher.parent.mkdir(parents=True)
    teacher.touch()
    assert sentence(folder / "model_final.rank_0.pth").endswith(f"has saved, {teacher}")


def test_a_rank_file_of_the_official_code_on_one_gpu_is_read(tmp_path):
    state = {f"teacher.backbone.{name}": tensor for name, tensor in nn.Linear(2, 2).state_dict().items()}
    torch.save({"model": state, "iteration": 9}, tmp_path / "model_0000009.rank_0.pth")
    weights = open_weights(tmp_path / "model_0000009.rank_0.pth")
    assert (weights.kind, list(weights.states), weights.extra_keys) == ("PyTorch file", ["teacher"], ("iteration",))
    assert list(weights.states["teacher"]) == ["backbone.weight", "backbone.bias"]
    with pytest.raises(CheckpointError) as caught:
        require_own_checkpoint(tmp_path / "model_0000009")
    assert str(caught.value) == (
        f"{tmp_path}/model_0000009: was saved by the official DINOv2 code, of which the weights are read but not the "
        f"state of training; start a new run from them with student.pretrained_weights={tmp_path}/model_0000009"
    )


def test_own_checkpoints_are_not_taken_for_others(tmp_path):
    require_own_checkpoint(tmp_path / "model_0000003")
    save(str(tmp_path))
    require_own_checkpoint(tmp_path / "model_0000003.rank_{rank}.pth")
    (tmp_path / "model_0000003.manifest.json").unlink()
    require_own_checkpoint(tmp_path / "model_0000003.rank_0.pth")


def test_weights_and_folders_are_not_the_state_of_a_run(tmp_path):
    save(str(tmp_path))
    for name in ("teacher_checkpoint.pth", "model.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError) as caught:
            require_own_checkpoint(tmp_path / name)
        assert str(caught.value) == (
            f"{tmp_path / name}: is no checkpoint of a training run, at most its weights; "
            f"start a new run from them with student.pretrained_weights={tmp_path / name}"
        )
    with pytest.raises(CheckpointError) as caught:
        require_own_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: is the folder of a training run; give one of its checkpoints, "
        f"the newest is {tmp_path}/model_0000003"
    )


def test_a_checkpoint_that_does_not_exist(tmp_path):
    assert sentence(tmp_path / "model_0000003.rank_0.pth") == (
        f"{tmp_path}/model_0000003: there is no model_0000003.manifest.json in {tmp_path}, so it is not complete"
    )
