"""Files of weights: every layout, nothing executed, nothing copied to memory, one sentence for each way to fail."""

import argparse
import gzip
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dinov2.errors import CheckpointError
from dinov2.hub.open_weights import open_weights

STATE = {"cls_token": torch.arange(4.0).view(1, 1, 4), "norm.weight": torch.ones(4, dtype=torch.bfloat16)}


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def values(state):
    return {name: stored.read() for name, stored in state.items()}


def same(state, expected):
    tensors = values(state)
    return list(tensors) == list(expected) and all(
        tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor) for name, tensor in expected.items()
    )


def sentence(path):
    with pytest.raises(CheckpointError) as caught:
        open_weights(path)
    return str(caught.value).removeprefix(f"{path}: ")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "no_suffix"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_files_of_torch_save_are_known_by_content(tmp_path, name, as_zip):
    weights = open_weights(saved(tmp_path / name, STATE, _use_new_zipfile_serialization=as_zip))
    assert (weights.path, weights.kind, weights.config) == (str(tmp_path / name), "PyTorch file", None)
    assert list(weights.states) == [""] and weights.extra_keys == ()
    assert weights.states[""]["cls_token"].shape == (1, 1, 4)
    assert weights.states[""]["norm.weight"].dtype == torch.bfloat16
    assert same(weights.states[""], STATE)


@pytest.mark.parametrize("name", ["w.safetensors", "wrong.pth"])
def test_safetensors_are_known_by_content(tmp_path, name):
    dtypes = [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int16, torch.uint8, torch.bool]
    state = STATE | {f"x{index}": torch.ones(2, 3).to(dtype) for index, dtype in enumerate(dtypes)}
    save_file(state, tmp_path / name)
    weights = open_weights(str(tmp_path / name))
    assert weights.kind == "safetensors file" and list(weights.states) == [""]
    for key, stored in weights.states[""].items():
        assert (stored.shape, stored.dtype) == (state[key].shape, state[key].dtype)
        assert torch.equal(stored.read().double(), state[key].double())
    assert weights.states[""].keys() == state.keys()


def test_a_file_of_torch_save_under_the_name_of_safetensors_is_refused(tmp_path):
    assert sentence(saved(tmp_path / "w.safetensors", STATE)) == (
        "is not a safetensors file but one of torch.save; rename it to w.pth"
    )


def test_a_type_that_is_not_read_is_named(tmp_path):
    save_file({"x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "w.safetensors")
    assert sentence(tmp_path / "w.safetensors") == (
        "x has the type C64, which is not read; known: F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U8, "
        "BOOL"
    )


@pytest.mark.parametrize(
    ("content", "keys", "extra_keys"),
    [
        ({"model": STATE, "epoch": 3}, ["model"], ("epoch",)),
        ({"teacher": STATE}, ["teacher"], ()),
        ({"student": STATE, "optimizer": {"state": {}}, "teacher": STATE}, ["teacher", "student"], ("optimizer",)),
        ({"state_dict": STATE, "arch": "vit", "model": {"depth": 2}}, ["state_dict"], ("arch", "model")),
        ({"model": STATE, "dino_loss": {"center": torch.ones(2)}}, ["model"], ("dino_loss",)),
        ({"pretrained_encoder": STATE, "epoch": 3}, ["pretrained_encoder"], ("epoch",)),
        (STATE | {"epoch": 3, "args": {"lr": 1.0}}, [""], ("epoch", "args")),
    ],
)
def test_networks_are_told_from_what_else_a_file_holds(tmp_path, content, keys, extra_keys):
    weights = open_weights(saved(tmp_path / "w.pth", content))
    assert list(weights.states) == keys and weights.extra_keys == extra_keys
    assert all(same(state, STATE) for state in weights.states.values())


def test_the_state_of_a_whole_training_model_is_split_into_its_networks(tmp_path):
    networks = {f"{network}.backbone.{name}": t for network in ("student", "teacher") for name, t in STATE.items()}
    weights = open_weights(saved(tmp_path / "w.pth", {"model": networks | {"dino_loss.center": torch.ones(2)}}))
    assert list(weights.states) == ["teacher", "student"] and weights.extra_keys == ("dino_loss",)
    assert same(weights.states["teacher"], {f"backbone.{name}": tensor for name, tensor in STATE.items()})
    save_file({name: tensor.clone() for name, tensor in networks.items()}, tmp_path / "w.safetensors")
    assert list(open_weights(tmp_path / "w.safetensors").states) == ["teacher", "student"]


def test_a_file_that_was_compressed_again_is_read_right(tmp_path):
    with zipfile.ZipFile(saved(tmp_path / "w.pth", STATE)) as stored:
        with zipfile.ZipFile(tmp_path / "smaller.pth", "w", zipfile.ZIP_DEFLATED) as compressed:
            for name in stored.namelist():
                compressed.writestr(name, stored.read(name))
    assert same(open_weights(tmp_path / "smaller.pth").states[""], STATE)


def test_parameters_come_without_gradient(tmp_path):
    weights = open_weights(saved(tmp_path / "w.pth", {"x": nn.Parameter(torch.ones(2))}))
    assert type(weights.states[""]["x"].read()) is torch.Tensor


def test_tensors_are_views_of_the_file(tmp_path):
    """Files of 200 MB, opened and looked at, take less than 8 MB of the program's own memory."""
    program = """
import sys, torch
from dinov2.hub.open_weights import open_weights

def own_memory_mb():
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) / 1000

def use(path):
    tensor = open_weights(path).states[""]["x"].read()
    assert tensor.sum() == tensor.numel()
    return tensor

small, *large = sys.argv[1:]
use(small)
before = own_memory_mb()
tensors = [use(path) for path in large]
print(own_memory_mb() - before)
"""
    paths = [tmp_path / name for name in ("small.pth", "large.pth", "large.safetensors")]
    large = torch.ones(50_000_000)
    saved(paths[0], {"x": torch.ones(2)}), saved(paths[1], {"x": large}), save_file({"x": large}, paths[2])
    result = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True)
    assert result.returncode == 0 and float(result.stdout) < 8, result.stdout + result.stderr


def test_a_missing_file(tmp_path):
    assert sentence(tmp_path / "none.pth") == "no such file of weights"
    assert sentence("https://example.org/w.pth") == "is a web address; download the file and give its path"


@pytest.fixture
def not_root():
    """Run as a user who owns nothing, because root may read everything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)


def test_what_may_not_be_read(tmp_path, not_root):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.pth"
        path.touch(mode=0)
        assert sentence(path) == "cannot be read (Permission denied)"
        os.chmod(folder, 0)
        for name in ("", "w.pth", "w.safetensors", "model_0000001.rank_0.pth", "model.safetensors.index.json"):
            assert sentence(Path(folder) / name) == "cannot be read (Permission denied)"
        os.chmod(folder, 0o700)
    assert sentence("x" * 300) == "cannot be read (File name too long)"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty (0 bytes); download or save it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
            "is a git-LFS pointer, not the weights; fetch them with: git lfs pull",
        ),
        (
            b"\n<!DOCTYPE html><html>",
            "is a web page, not weights; the download was answered by a page (log-in or wrong address)",
        ),
    ],
)
def test_downloads_that_are_no_weights(tmp_path, suffix, content, expected):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    assert sentence(path) == expected


def test_text_is_no_weights(tmp_path):
    (tmp_path / "w.pth").write_text("some text")
    assert sentence(tmp_path / "w.pth") == (
        "is not a file of weights that PyTorch can read, or is truncated (0.0 MiB); download or save it again"
    )
    (tmp_path / "w.safetensors").write_text("some text")
    assert sentence(tmp_path / "w.safetensors") == (
        "cannot be read as safetensors, it is truncated or damaged "
        "(Error while deserializing header: header too large); download or save it again"
    )


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_truncated_files(tmp_path, kept):
    def truncate(path):
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
        return path

    large = {"x": torch.ones(50_000)}
    size = f"{int(kept * saved(tmp_path / 'w.pth', large).stat().st_size) / 2**20:.1f} MiB"
    assert sentence(truncate(tmp_path / "w.pth")) == (
        f"ends early ({size} are there), it is truncated; download or save it again"
    )
    assert sentence(truncate(saved(tmp_path / "old.pth", large, _use_new_zipfile_serialization=False))) == (
        f"is not a file of weights that PyTorch can read, or is truncated ({size}); download or save it again"
    )
    save_file(large, tmp_path / "w.safetensors")
    assert sentence(truncate(tmp_path / "w.safetensors")) == (
        "cannot be read as safetensors, it is truncated or damaged "
        "(Error while deserializing header: incomplete metadata, file not fully covered); download or save it again"
    )


def test_safetensors_without_tensors(tmp_path):
    save_file({}, tmp_path / "w.safetensors")
    assert sentence(tmp_path / "w.safetensors") == "is a safetensors file without any tensor; download or save it again"


@pytest.mark.parametrize("as_zip", [True, False])
def test_objects_of_python_are_refused_and_nothing_runs(tmp_path, as_zip):
    content = {"model": STATE, "args": argparse.Namespace(lr=1), "payload": Payload(tmp_path / "ran")}
    path = saved(tmp_path / "w.pth", content, _use_new_zipfile_serialization=as_zip)
    assert sentence(path) == (
        "holds Python objects besides tensors (argparse.Namespace, posix.mkdir), which are refused because reading "
        "them can run code; give a teacher_checkpoint.pth, or re-save the state dict alone"
    )
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload must work, or the line above shows nothing"


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_is_refused_and_nothing_runs(tmp_path, protocol):
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": Payload(tmp_path / "ran"), "x": np.ones(2)}, protocol=protocol))
    assert sentence(path).startswith("is a bare Python pickle (posix.mkdir, ")
    assert not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps({"lr": 1}, protocol=protocol))
    assert sentence(path) == (
        "is a bare Python pickle, which is refused because reading it can run code; "
        "give a file that torch.save or safetensors wrote"
    )


def test_archives_of_something_else(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with gzip.open(tmp_path / "gz.pth", "wb") as file:
        file.write(b"a")
    assert sentence(tmp_path / "gz.pth") == "is a gzip archive; unpack it and give the file of weights in it"
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        archive.add(tmp_path / "a.txt", "a.txt")
    assert sentence(tmp_path / "tar.pth") == "is a tar archive; unpack it and give the file of weights in it"
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.write(tmp_path / "a.txt", "a.txt")
    assert sentence(tmp_path / "zip.pth") == (
        "is a zip archive of other files (first: a.txt), not weights; unpack it and give the file of weights in it"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_torchscript_program_is_not_run(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "w.pt"))
    assert sentence(tmp_path / "w.pt") == (
        "is a TorchScript program, which is not run here; "
        "if you trust it, save its weights with: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
    )


@pytest.mark.parametrize("keys", [("state", "param_groups"), ("optimizer", "iteration")])
def test_an_optimiser_alone_is_refused(tmp_path, keys):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = optimizer.state_dict() if "state" in keys else {"optimizer": optimizer.state_dict(), "iteration": 3}
    where = "" if "state" in keys else " (under 'optimizer')"
    assert sentence(saved(tmp_path / "w.pth", content)) == (
        f"holds the state of an optimiser{where} but no network; give the file that holds the weights"
    )


def test_values_that_are_no_tensors_are_refused(tmp_path):
    known = "(known: a state dict, bare or under 'teacher', 'student', 'model' or 'state_dict')"
    for content, expected in (
        ([torch.ones(1)], "holds a list, not a dict of named tensors"),
        (torch.ones(1), "holds a Tensor, not a dict of named tensors"),
        ({}, "holds no tensors"),
        ({"lr": 1}, f"is not a known file of weights; 'lr' is a int, not a tensor {known}"),
        (
            {"epoch": 1, "model": {"backbone": {"x": torch.ones(1)}}},
            f"is not a known file of weights; 'backbone' under 'model' is a dict, not a tensor {known}",
        ),
        (
            {"model": STATE | {"lr": 1.0}},
            f"is not a known file of weights; 'lr' under 'model' is a float, not a tensor {known}",
        ),
    ):
        assert sentence(saved(tmp_path / "w.pth", content)) == expected
