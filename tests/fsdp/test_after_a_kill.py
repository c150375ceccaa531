"""A run killed after the manifest of its last checkpoint: the next start does what was to follow."""

import shutil

import pytest
from support.dist import run_distributed
from support.toy_run import Run, names

from dinov2.checkpoint_format import find_checkpoints
from dinov2.run.checkpoint_verify import verify

TAG = "last_checkpoint.rank_0"


def test_tag_copy_and_deletion_are_made_up_for(tmp_path):
    for name in ("straight", "killed"):
        options = {"period": 1, "max_to_keep": 1, "copy_to": str(tmp_path / f"{name} copy")}
        Run(tmp_path / name, **options).train(3 if name == "straight" else 2)
    tag = (tmp_path / "killed" / TAG).read_text()
    saving_alone = Run(tmp_path / "killed", period=1)
    saving_alone.resume()
    saving_alone.train(3)
    (tmp_path / "killed" / TAG).write_text(tag)
    assert find_checkpoints(tmp_path / "killed") == ["model_0000001", "model_0000002"]
    assert find_checkpoints(tmp_path / "killed copy") == ["model_0000001"]

    restarted = Run(tmp_path / "killed", **options)
    restarted.resume()
    restarted.checkpointer.clean_up()
    for kind in ("", " copy"):
        assert names(tmp_path / f"killed{kind}") == names(tmp_path / f"straight{kind}")
        assert verify(tmp_path / f"killed{kind}", "model_0000002")[1] == []
    assert (tmp_path / "killed" / TAG).read_text() == "model_0000002.rank_0.pth"


def test_a_checkpoint_of_another_folder_is_left_as_it_is(tmp_path):
    Run(tmp_path / "old", period=1).train(2)
    before = names(tmp_path / "old")
    run = Run(tmp_path / "new", period=1, max_to_keep=1, copy_to=str(tmp_path / "copy"))
    run.checkpointer.load(str(tmp_path / "old" / "model_0000001"))
    run.checkpointer.clean_up()
    assert names(tmp_path / "old") == before and names(tmp_path) == ["old"]


def save_on_all(folder):
    run = Run(folder, strategy="FULL_SHARD", period=1).train(2)
    run.checkpointer.close()


@pytest.mark.dist
def test_one_process_copies_the_files_of_three(tmp_path):
    run_distributed(save_on_all, num_processes=3, args={"folder": str(tmp_path / "run")})
    run = Run(tmp_path / "run", period=1, copy_to=str(tmp_path / "copy"))
    run.resume()
    run.checkpointer.clean_up()
    assert names(tmp_path / "copy") == [name for name in names(tmp_path / "run") if "0000001." in name]
    assert verify(tmp_path / "copy", "model_0000001")[1] == []
    shutil.rmtree(tmp_path / "run")
    again = Run(tmp_path / "run", period=1, copy_to=str(tmp_path / "copy"))
    assert again.resume()["iteration"] == 1
