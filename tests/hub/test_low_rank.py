"""Low-rank updates in files: merged with the config of their run, refused without."""

import json

import pytest
import torch

from dinov2.errors import CheckpointError
from dinov2.hub.low_rank import merge_low_rank_updates, refuse_unmerged_updates
from dinov2.hub.stored_tensor import StoredTensor

CONFIG = json.dumps({"lora": {"alpha": 6.0}})


def state(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "a.lora_a": (2, 3), "a.lora_b": (4, 2), "b.weight": (3, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_added_to_their_weights_when_these_are_read(dtype):
    tensors = state(dtype)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    stored = {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}
    merged = merge_low_rank_updates(stored, config=CONFIG, where="f")
    assert list(merged) == ["a.weight", "a.bias", "b.weight"]
    expected = kept["a.weight"] + 3 * kept["a.lora_b"] @ kept["a.lora_a"]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}  # 8 bits
    torch.testing.assert_close(merged["a.weight"].read(), expected, **tolerance)
    assert merged["b.weight"].read() is tensors["b.weight"]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())


def test_without_updates_no_config_is_needed():
    plain = {"a.weight": StoredTensor.of(torch.zeros(2, 2))}
    assert merge_low_rank_updates(plain, config="", where="f") is plain


@pytest.mark.parametrize("config", ["", "{}", '{"lora": {}}', '{"lora": {"alpha": "much"}}', "[]"])
def test_updates_without_the_config_of_their_run_are_refused(config):
    stored = {name: StoredTensor.of(tensor) for name, tensor in state().items()}
    with pytest.raises(CheckpointError) as caught:
        merge_low_rank_updates(stored, config=config, where="run/model_0000001")
    assert str(caught.value) == (
        "run/model_0000001: holds low-rank updates, and no lora.alpha of the run that trained them; give a "
        "teacher_checkpoint.pth of that run, which has none"
    )


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.lora_a", "base_model.model.q.lora_A.default.weight", "lora_B"])
def test_updates_of_any_library_beside_the_weights_are_refused(name):
    with pytest.raises(CheckpointError) as caught:
        refuse_unmerged_updates(["blocks.0.attn.qkv.weight", name], path="w.pth")
    assert str(caught.value) == (
        f"w.pth: holds low-rank updates ({name}) beside the weights they belong to; merge them first, or give the "
        f"checkpoint of the run that trained them, or its teacher_checkpoint.pth"
    )
    refuse_unmerged_updates(["exploration_a.weight", "flora_b"], path="w.pth")
