"""Parts of a model that a checkpoint, or a state dict, may lack or have beyond it."""

import pytest
import torch
from torch import nn

from dinov2.errors import CheckpointError
from dinov2.fsdp import FSDPCheckpointer, load_full_state_dict


def model(*parts, value=0.0):
    made = nn.ModuleDict({name: nn.Linear(3, 2) for name in parts})
    for param in made.parameters():
        nn.init.constant_(param, value)
    return made


def values(module):
    return {param.flatten()[0].item() for param in module.parameters()}


def checkpointer(made, folder, **options):
    return FSDPCheckpointer(made, str(folder), **options)


@pytest.mark.parametrize(("saved", "loaded"), [(("a",), ("a", "extra")), (("a", "extra"), ("a",))])
def test_an_optional_part_may_be_on_one_side_only(tmp_path, saved, loaded):
    checkpointer(model(*saved, value=1.0), tmp_path).save("model_0000000", iteration=0)
    target = model(*loaded, value=2.0)
    checkpointer(target, tmp_path, optional_parts=("extra.",)).load(str(tmp_path / "model_0000000"))
    assert values(target["a"]) == {1.0}
    if "extra" in target:
        assert values(target["extra"]) == {2.0}


def test_an_optional_part_that_both_have_is_restored(tmp_path):
    checkpointer(model("a", "extra", value=1.0), tmp_path).save("model_0000000", iteration=0)
    target = model("a", "extra", value=2.0)
    checkpointer(target, tmp_path, optional_parts=("extra.",)).load(str(tmp_path / "model_0000000"))
    assert values(target) == {1.0}


@pytest.mark.parametrize("options", [{}, {"optional_parts": ("other.",)}])
def test_other_parts_must_be_there(tmp_path, options):
    checkpointer(model("a"), tmp_path).save("model_0000000", iteration=0)
    with pytest.raises(CheckpointError, match=r"2 missing \(first: extra.bias\), 0 unexpected"):
        checkpointer(model("a", "extra"), tmp_path, **options).load(str(tmp_path / "model_0000000"))


def test_a_partial_state_leaves_the_rest_as_it_is():
    target = model("a", "b", value=2.0)
    load_full_state_dict(target, model("a", value=1.0).state_dict(), is_partial=True)
    assert (values(target["a"]), values(target["b"])) == ({1.0}, {2.0})
    with pytest.raises(CheckpointError, match="0 missing .*, 2 unexpected"):
        load_full_state_dict(target, model("c").state_dict(), is_partial=True)
    with pytest.raises(CheckpointError, match="2 missing"):
        load_full_state_dict(target, {k: torch.zeros_like(v) for k, v in model("a").state_dict().items()})
