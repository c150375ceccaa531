"""Files written one tensor after another are those that the libraries write, and take the memory of one tensor."""

import io
import os
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dinov2.hub.stored_tensor import StoredTensor
from dinov2.hub.stream_tensors import SAFETENSORS_DTYPES, stream_safetensors, stream_torch

TENSORS = {
    "weight": torch.arange(1000.0).reshape(50, 20),
    "half": torch.arange(7).bfloat16(),
    "none": torch.empty(0, 3),
    "alone": torch.tensor(5),
    "flags": torch.tensor([True, False]),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "part": torch.arange(100)[10:13],
}
STATE = {name: StoredTensor.of(tensor) for name, tensor in TENSORS.items()}


def check(loaded):
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_was_streamed(tmp_path, mmap):
    path = tmp_path / "teacher.pth"
    stream_torch(path, {"teacher": STATE, "student": {"x": STATE["weight"]}})
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == ["teacher", "student"] and list(loaded["teacher"]) == list(TENSORS)
    check(loaded["teacher"])
    assert torch.equal(loaded["student"]["x"], TENSORS["weight"])
    stream_torch(path, STATE)
    check(torch.load(path, weights_only=True, mmap=mmap))


def test_the_file_is_laid_out_as_torch_save_does_with_all_checksums(tmp_path):
    stream_torch(tmp_path / "archive.pth", STATE)
    plain = io.BytesIO()
    torch.save({name: tensor.contiguous().clone() for name, tensor in TENSORS.items()}, plain)
    with zipfile.ZipFile(tmp_path / "archive.pth") as streamed, zipfile.ZipFile(plain) as whole:
        assert streamed.testzip() is None
        for record, expected in zip(streamed.infolist(), whole.infolist(), strict=True):
            assert (record.filename, record.file_size) == (expected.filename, expected.file_size)
            if "/data/" in record.filename:
                assert (record.header_offset, record.CRC) == (expected.header_offset, expected.CRC)


def test_safetensors_reads_what_was_streamed(tmp_path):
    path = tmp_path / "model.safetensors"
    stream_safetensors(path, STATE, metadata={"format": "pt"})
    check(load_file(path))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values())
def test_every_type_of_safetensors(tmp_path, dtype):
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    stream_safetensors(tmp_path / "x.safetensors", {"x": StoredTensor.of(tensor)}, metadata={})
    loaded = load_file(tmp_path / "x.safetensors")["x"]
    assert loaded.dtype == dtype and torch.equal(loaded.float(), tensor.float())


def test_a_type_that_safetensors_lacks(tmp_path):
    state = {"x": StoredTensor.of(torch.zeros(2, dtype=torch.complex64))}
    with pytest.raises(ValueError, match="^x has the type torch.complex64, which safetensors does not have$"):
        stream_safetensors(tmp_path / "x.safetensors", state, metadata={})


def own_memory_kib():
    """Memory of this process that is no page of a file."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell")
@pytest.mark.parametrize("write", [stream_torch, stream_safetensors])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, write):
    num_values, peak = 1 << 20, 0

    def read():
        nonlocal peak
        tensor = torch.ones(num_values)
        peak = max(peak, own_memory_kib())
        return tensor

    state = {str(index): StoredTensor(torch.Size([num_values]), torch.float32, read) for index in range(16)}
    before = own_memory_kib()
    if write is stream_torch:
        stream_torch(tmp_path / "x", state)
    else:
        stream_safetensors(tmp_path / "x", state, metadata={})
    assert peak - before < 2.5 * 4096  # a tensor has 4096 KiB; the last one lives while the next is read
