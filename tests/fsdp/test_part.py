"""What a rank saves is remembered from save to save, and found anew when anything of it has changed."""

import pytest
import torch
from support.dist import run_distributed
from support.toy_run import Run, copy_of, same

from dinov2 import distributed
from dinov2.fsdp import local_tensors


def saved_again(run, folder):
    """Save under one name and load into another run; says whether that is what the first one has."""
    before = copy_of(run.contents())
    run.checkpointer.save("model_0000009", iteration=9)
    run.checkpointer.wait()
    again = Run(folder, seed=5, strategy=run.checkpointer.sharding_strategy)
    again.optimizer.add_param_group({"params": []}) if len(run.optimizer.param_groups) > 2 else None
    again.checkpointer.load(f"{folder}/model_0000009")
    return same(again.contents(), before)


def changes_between_saves(folder, strategy):
    """Save after each way in which the state's tensors can become others; returns which came back."""
    run = Run(folder, strategy=strategy, period=100, background=True)
    found = [saved_again(run, folder)]  # no optimiser state yet
    run.train(2)
    found.append(saved_again(run, folder))
    run.train(4)  # the same tensors with other values
    found.append(saved_again(run, folder))
    run.checkpointer.load(f"{folder}/model_0000009")
    run.train(6)
    found.append(saved_again(run, folder))
    backbone = run.model["student"]["backbone"]
    backbone.centre = backbone.centre + 1  # a buffer is another tensor
    found.append(saved_again(run, folder))
    with torch.no_grad():
        for part in local_tensors(run.model["teacher"]["head"]):
            part.set_(part * 2)  # a parameter has its values elsewhere
    found.append(saved_again(run, folder))
    for values in run.optimizer.state.values():
        values["exp_avg"] = values["exp_avg"] + 1
    found.append(saved_again(run, folder))
    run.optimizer.param_groups[0]["lr"] = 0.5
    run.optimizer.param_groups[1]["betas"] = (0.1, 0.2)
    found.append(saved_again(run, folder))
    run.optimizer.add_param_group({"params": []})
    found.append(saved_again(run, folder))
    distributed.barrier()
    run.checkpointer.close()
    return found


def test_every_change_of_the_state_is_saved(tmp_path):
    assert changes_between_saves(str(tmp_path), "NO_SHARD") == [True] * 9


@pytest.mark.dist
def test_every_change_of_a_sharded_state_is_saved(tmp_path):
    args = {"folder": str(tmp_path), "strategy": "FULL_SHARD"}
    assert run_distributed(changes_between_saves, args=args) == [[True] * 9] * 2
