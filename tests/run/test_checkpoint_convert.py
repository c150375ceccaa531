"""`run/checkpoint.py consolidate` and `reshard`: the files are those of training, and nothing is left of a failure."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run.test_checkpoint import run, save
from safetensors.torch import load_file
from support.dist import run_distributed
from support.toy_fsdp import make_toy
from torch import nn

from dinov2 import checkpoint_format as files
from dinov2 import fsdp
from dinov2.fsdp import FSDPCheckpointer, full_state_dict
from dinov2.fsdp.layout import local_part
from dinov2.fsdp.rng import RngState
from dinov2.run import checkpoint_reshard
from dinov2.run.checkpoint import main


def expected_teacher():
    return make_toy(2).state_dict()


def same(loaded, state):
    return loaded.keys() == state.keys() and all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_consolidate_writes_the_teacher_as_training_does(tmp_path, capsys):
    path, out = save(tmp_path), tmp_path / "out" / "teacher_checkpoint.pth"
    code, lines, err = run(capsys, "consolidate", tmp_path, "--output", out)
    assert (code, err) == (0, "")
    assert lines == [f"{out}: teacher of {path}, 18 tensors, 217 values, 888 bytes"]
    for mmap in (True, False):
        loaded = torch.load(out, weights_only=True, mmap=mmap)
        assert list(loaded) == ["teacher"] and same(loaded["teacher"], expected_teacher())
    assert [file.name for file in out.parent.iterdir()] == ["teacher_checkpoint.pth"]


def test_consolidate_takes_other_networks_and_forms(tmp_path, capsys):
    path = save(tmp_path)
    teacher = expected_teacher()
    backbone = {name.removeprefix("backbone."): t for name, t in teacher.items() if name.startswith("backbone.")}

    def write(name, *options):
        assert run(capsys, "consolidate", path, "--output", tmp_path / name, *options)[0] == 0
        if name.endswith(".safetensors"):
            return load_file(tmp_path / name)
        return torch.load(tmp_path / name, weights_only=True)

    saved = files.StoredCheckpoint.open(tmp_path, "model_0000003").model
    student = {name.removeprefix("student."): t.read_all() for name, t in saved.items() if name.startswith("student.")}
    loaded = write("both.pth", "--network", "all")
    assert list(loaded) == ["teacher", "student"] and same(loaded["student"], student)
    assert same(write("student.pth", "--network", "student")["student"], student)
    assert same(write("backbone.pt", "--backbone-only"), backbone)
    assert same(write("teacher.safetensors"), teacher)
    assert set(write("both.safetensors", "--network", "all")) == {
        f"{network}.{name}" for network in ("teacher", "student") for name in teacher
    }
    assert run(capsys, "diff", tmp_path / "both.safetensors", tmp_path / "both.pth")[0] == 0


def test_consolidate_refuses(tmp_path, capsys):
    path, out = save(tmp_path), tmp_path / "t.pth"
    out.write_text("kept")
    (tmp_path / "folder.pth").mkdir()
    torch.save({"teacher": {"x": torch.ones(1)}}, tmp_path / "w.pth")
    for argv, code, sentence in (
        ([path, "--output", out], 2, f"--output {out}: exists; choose another, or pass --overwrite"),
        ([path, "--output", tmp_path / "folder.pth"], 2, f"--output {tmp_path}/folder.pth: is a folder; choose a file"),
        ([path, "--output", "t.txt"], 2, "--output t.txt: must end in one of .pth, .pt, .bin, .safetensors"),
        (
            [tmp_path / "w.pth", "--output", "o.pth", "--network", "student"],
            1,
            f"{tmp_path}/w.pth: has no student; it holds teacher",
        ),
        (
            [tmp_path / "w.pth", "--output", "o.pth", "--backbone-only"],
            1,
            f"{tmp_path}/w.pth: the teacher has no tensors under 'backbone.'; leave out --backbone-only",
        ),
    ):
        assert run(capsys, "consolidate", *argv) == (code, [], f"error: {sentence}")
    assert out.read_text() == "kept"
    assert run(capsys, "consolidate", path, "--output", out, "--overwrite")[0] == 0
    assert same(torch.load(out, weights_only=True)["teacher"], expected_teacher())


def test_a_damaged_checkpoint_gives_no_file(tmp_path, capsys):
    path = save(tmp_path)
    file = Path(f"{path}.rank_0.pth")
    content = file.read_bytes()
    place = content.index(expected_teacher()["backbone.embed.weight"].numpy().tobytes())
    file.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    for argv in (["consolidate", path, "--output", tmp_path / "out.pth"],
                 ["reshard", path, "--ranks", "2", "--output-dir", tmp_path / "out"]):  # fmt: skip
        code, lines, err = run(capsys, *argv)
        assert (code, lines) == (1, []) and err.startswith(f"error: {file}: bytes 0 to ")
    assert not list(tmp_path.glob("out*/*")) and not list(tmp_path.glob("out.pth*"))


def test_a_reshard_that_fails_leaves_what_it_was_to_replace(tmp_path, capsys, monkeypatch):
    def fail(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, out = save(tmp_path / "run"), tmp_path / "out"
    assert run(capsys, "reshard", path, "--ranks", "2", "--output-dir", out)[0] == 0
    monkeypatch.setattr(checkpoint_reshard, "stream_torch", fail)
    assert run(capsys, "reshard", path, "--ranks", "3", "--output-dir", out, "--overwrite")[0] == 1
    assert run(capsys, "verify", out)[0] == 0 and len(list(out.iterdir())) == 3


LIMITED = """
import resource, sys
from dinov2.run.checkpoint import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
codes = [main(["consolidate", sys.argv[1], "--output", f"{sys.argv[2]}/t.pth"]),
         main(["reshard", sys.argv[1], "--ranks", "2", "--output-dir", sys.argv[2]])]
print(codes)
"""


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path):
    path, out = save(tmp_path), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", LIMITED, path, out], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[1, 1]\n"), done.stderr
    reason = os.strerror(errno.EFBIG)
    assert f"{out}/t.pth: cannot be written ({reason}); free some space or choose another place" in done.stderr
    assert f"{out}/model_0000003: cannot be written ({reason}); free some space or choose another folder" in done.stderr
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("num_ranks", "strategy"), [(1, "NO_SHARD"), (3, "FULL_SHARD"), (3, "NO_SHARD"), (40, None)])
def test_reshard_keeps_everything(tmp_path, capsys, num_ranks, strategy):
    path, out = save(tmp_path / "run"), tmp_path / "out"
    options = ["--strategy", strategy] if strategy else []
    code, lines, err = run(capsys, "reshard", path, "--ranks", num_ranks, "--output-dir", out, *options)
    assert (code, err) == (0, "")
    assert lines[0].startswith(f"{out}/model_0000003: {strategy or 'NO_SHARD'}, {num_ranks} rank file")
    assert run(capsys, "verify", out)[0] == 0
    assert run(capsys, "diff", path, out) == (0, ["54 tensors compared, 0 with other values; equal"], "")
    before, now = files.open_checkpoint(tmp_path / "run", "model_0000003"), files.open_checkpoint(out, "model_0000003")
    for field in ("iteration", "time", "versions", "metrics", "global_batch_size", "config_digest"):
        assert getattr(now, field) == getattr(before, field)
    sizes = [
        sum(t.numel() for t in torch.load(file, weights_only=True)["model"].values()) for file in out.glob("*.pth")
    ]
    assert len(sizes) == num_ranks and sum(sizes) == 2 * 217 + 6


def test_reshard_refuses(tmp_path, capsys):
    path, out = save(tmp_path / "run"), tmp_path / "out"
    own = tmp_path / "run"
    assert run(capsys, "reshard", path, "--ranks", "2", "--output-dir", own)[::2] == (
        2,
        f"error: --output-dir {own}: is the folder of the checkpoint itself; choose another",
    )
    assert run(capsys, "reshard", path, "--ranks", "4", "--output-dir", out)[0] == 0
    assert run(capsys, "reshard", path, "--ranks", "2", "--output-dir", out)[::2] == (
        2,
        f"error: --output-dir {out}: holds a model_0000003; choose another, or pass --overwrite",
    )
    assert run(capsys, "reshard", path, "--ranks", "2", "--output-dir", out, "--overwrite")[0] == 0
    assert sorted(file.name for file in out.iterdir()) == [
        "model_0000003.manifest.json", "model_0000003.rank_0.pth", "model_0000003.rank_1.pth",
    ]  # fmt: skip
    assert run(capsys, "reshard", path, "--ranks", "0", "--output-dir", out)[0] == 2


def build(strategy):
    """Build a sharded run."""
    model = nn.ModuleDict({"student": make_toy(1), "teacher": make_toy(2)})
    for name in ("student", "teacher"):
        for module in model[name].values():
            fsdp.shard(module, strategy=strategy)
    optimizer = torch.optim.AdamW(param for param in model.parameters() if param.requires_grad)
    return model, optimizer


def save_on_ranks(folder):
    """Save after a step, and the teacher as training writes it."""
    model, optimizer = build("FULL_SHARD")
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.manual_seed(7 + torch.distributed.get_rank())
    checkpointer = FSDPCheckpointer(
        model, folder, sharding_strategy="FULL_SHARD", background=False, optimizer=optimizer, rng=RngState()
    )
    checkpointer.save("model_0000003", iteration=3)
    checkpointer.close()
    teacher = full_state_dict(model["teacher"])
    if torch.distributed.get_rank() == 0:
        torch.save({"teacher": teacher}, f"{folder}/teacher_checkpoint.pth")


def load_on_ranks(folder, strategy):
    """Load, and return all that this rank then has."""
    model, optimizer = build(strategy)
    checkpointer = FSDPCheckpointer(
        model, folder, sharding_strategy=strategy, background=False, optimizer=optimizer, rng=RngState()
    )
    checkpointer.resume_or_load("")
    checkpointer.close()
    state = {f"model {name}": local_part(tensor) for name, tensor in model.state_dict().items()}
    for number, values in enumerate(optimizer.state.values()):
        state |= {f"{number} {key}": local_part(tensor) for key, tensor in values.items()}
    return state | {"random": torch.rand(8)}


@pytest.mark.integration
@pytest.mark.dist
def test_ranks_continue_from_a_resharded_checkpoint_as_from_the_original(tmp_path, capsys):
    run_distributed(save_on_ranks, num_processes=2, args={"folder": str(tmp_path / "run")})
    out = tmp_path / "teacher.pth"
    assert run(capsys, "consolidate", tmp_path / "run", "--output", out)[0] == 0
    assert same(
        torch.load(out, weights_only=True)["teacher"],
        torch.load(tmp_path / "run" / "teacher_checkpoint.pth", weights_only=True)["teacher"],
    )
    assert main(["reshard", str(tmp_path / "run"), "--ranks", "3", "--output-dir", str(tmp_path / "three")]) == 0
    loaded = [
        run_distributed(
            load_on_ranks, num_processes=3, args={"folder": str(tmp_path / name), "strategy": "SHARD_GRAD_OP"}
        )
        for name in ("run", "three")
    ]
    for elastic, resharded in zip(*loaded, strict=True):
        assert len(elastic) > 40 and same(resharded, elastic)
