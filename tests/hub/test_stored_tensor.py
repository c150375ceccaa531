"""Tensors that are planned before they are read."""

import pytest
import torch

from dinov2.hub.stored_tensor import StoredTensor


def test_a_chain_of_maps_is_planned_without_reading_and_read_once():
    reads = []

    def read():
        reads.append(1)
        return torch.arange(6.0).view(2, 3)

    stored = StoredTensor(torch.Size((2, 3)), torch.float32, read)
    mapped = stored.map((3, 2), lambda x: x.T).map([6], lambda x: x.flatten().half(), dtype=torch.float16)
    assert (mapped.shape, mapped.dtype, mapped.numel(), reads) == ((6,), torch.float16, 6, [])
    assert torch.equal(mapped.read(), torch.tensor([0, 3, 1, 4, 2, 5], dtype=torch.float16))
    assert reads == [1]


def test_a_tensor_in_memory_is_given_back_without_a_copy():
    tensor = torch.ones(2, 3, dtype=torch.bfloat16)
    stored = StoredTensor.of(tensor)
    assert (stored.shape, stored.dtype) == (tensor.shape, tensor.dtype)
    assert stored.read() is tensor


def test_a_map_that_does_not_make_what_was_planned_is_our_mistake():
    with pytest.raises(AssertionError) as error:
        StoredTensor.of(torch.ones(2)).map((3,), lambda x: x).read()
    assert str(error.value) == "planned (3,) torch.float32, made (2,) torch.float32"
