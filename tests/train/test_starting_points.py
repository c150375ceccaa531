"""Where a run starts: its folder's newest checkpoint, resume_path, MODEL.WEIGHTS, pretrained weights, or at random."""

import pytest
import torch
from support.training import metrics_of, train

# Steps that change nothing, so that a checkpoint shows what the run started from.
STILL = ("optim.base_lr=0", "optim.min_lr=0", "teacher.momentum_teacher=1", "train.centering=sinkhorn_knopp")


def state_of(folder, step):
    return torch.load(folder / f"model_{step:07d}.rank_0.pth", weights_only=True)


def network(state, name, part="backbone"):
    prefix = f"{name}.{part}."
    return {key.removeprefix(prefix): value for key, value in state["model"].items() if key.startswith(prefix)}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def is_equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of four steps with checkpoints after the second and the fourth and its teacher's weights."""
    folder = tmp_path_factory.mktemp("other") / "run"
    options = ["train.seed=5", "train.max_steps=4", "checkpointing.period=2", "teacher.momentum_teacher=0.5"]
    assert train(folder, *options, "optim.base_lr=0.1", "evaluation.eval_period_iterations=4") == 0
    return folder


@pytest.fixture
def teacher_file(other):
    return other / "eval" / "training_3" / "teacher_checkpoint.pth"


def test_the_newest_checkpoint_of_the_folder_wins(tmp_path, other, teacher_file):
    assert train(tmp_path, "train.max_steps=1") == 0
    sources = [
        f"train.resume_path={other}/model_0000001.rank_{{rank}}.pth",
        f"MODEL.WEIGHTS={teacher_file}",
        f"student.pretrained_weights={teacher_file}",
    ]
    assert train(tmp_path, *sources, "train.max_steps=2", *STILL) == 0
    assert [row["iteration"] for row in metrics_of(tmp_path)] == [0, 1]
    assert_equal(network(state_of(tmp_path, 1), "student"), network(state_of(tmp_path, 0), "student"))


def test_resume_path_restores_the_whole_state(tmp_path, other, teacher_file):
    options = [f"train.resume_path={other}/model_0000001.rank_{{rank}}.pth", f"MODEL.WEIGHTS={teacher_file}"]
    options += ["train.seed=5", "teacher.momentum_teacher=0.5", "optim.base_lr=0.1"]
    assert train(tmp_path, *options, "train.max_steps=4") == 0
    assert [row["iteration"] for row in metrics_of(tmp_path)] == [2, 3]
    for name in ("student", "teacher"):
        assert_equal(network(state_of(tmp_path, 3), name), network(state_of(other, 3), name))


def test_model_weights_as_teacher_file(tmp_path, other, teacher_file):
    assert train(tmp_path, f"MODEL.WEIGHTS={teacher_file}", "train.max_steps=1", *STILL) == 0
    state, given = state_of(tmp_path, 0), torch.load(teacher_file, weights_only=True)["teacher"]
    for part in ("backbone", "dino_head"):
        expected = network(state_of(other, 3), "teacher", part)
        assert_equal(expected, {k.removeprefix(f"{part}."): v for k, v in given.items() if k.startswith(f"{part}.")})
        for name in ("student", "teacher"):
            assert_equal(network(state, name, part), expected)


def test_model_weights_as_checkpoint(tmp_path, other):
    assert train(tmp_path, f"MODEL.WEIGHTS={other}/model_0000003.rank_0.pth", "train.max_steps=1", *STILL) == 0
    assert [row["iteration"] for row in metrics_of(tmp_path)] == [0]
    state, saved = state_of(tmp_path, 0), state_of(other, 3)
    for name in ("student", "teacher"):
        assert_equal(network(state, name), network(saved, name))
    assert not is_equal(network(saved, "student"), network(saved, "teacher"))


def test_pretrained_weights_reach_backbones_and_heads_of_student_and_teacher(tmp_path, other, teacher_file):
    assert train(tmp_path, f"student.pretrained_weights={teacher_file}", "train.max_steps=1", *STILL) == 0
    for part in ("backbone", "dino_head"):
        for name in ("student", "teacher"):
            given = network(state_of(other, 3), "teacher", part)
            assert_equal(network(state_of(tmp_path, 0), name, part), given)


def test_heads_that_the_file_lacks_or_that_do_not_fit_are_drawn(tmp_path, other, teacher_file, capsys):
    backbone_file = tmp_path / "backbone.pth"
    torch.save(network(state_of(other, 3), "teacher"), backbone_file)
    more = "dino.head_n_prototypes=40"
    heads = {}
    for name, options in {
        "backbone": [f"student.pretrained_weights={backbone_file}", more],
        "unfit": [f"student.pretrained_weights={teacher_file}", more],
    }.items():
        assert train(tmp_path / name, *options, "train.max_steps=1", *STILL) == 0
        state = state_of(tmp_path / name, 0)
        assert_equal(network(state, "student"), network(state_of(other, 3), "teacher"))
        assert_equal(network(state, "student", "dino_head"), network(state, "teacher", "dino_head"))
        heads[name] = network(state, "student", "dino_head")
    assert_equal(heads["backbone"], heads["unfit"])
    log = capsys.readouterr().err
    assert "dino_head starts from random numbers: the file has none" in log
    assert "dino_head starts from random numbers: it has 32 prototypes, the model 40" in log


def test_what_a_checkpoint_overrules_is_not_read(tmp_path):
    assert train(tmp_path, "train.max_steps=1") == 0
    missing = f"student.pretrained_weights={tmp_path}/gone.pth"
    assert train(tmp_path, "train.max_steps=2", missing) == 0
    assert [row["iteration"] for row in metrics_of(tmp_path)] == [0, 1]


def test_eval_only_evaluates_the_newest_checkpoint_and_writes_nothing_else(tmp_path):
    knn = [f"evaluation.knn.{part}_dataset_path=Digits:split=VAL" for part in ("train", "val")]
    assert train(tmp_path, "train.max_steps=2") == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert train(tmp_path, "--eval-only", *knn) == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    folder = tmp_path / "eval" / "manual_1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "results_eval_health.json",
        "results_eval_knn.json",
        "teacher_checkpoint.pth",
    ]
    weights = torch.load(folder / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert torch.equal(weights["backbone.cls_token"], network(state_of(tmp_path, 1), "teacher")["cls_token"])


def test_a_finished_run_started_again_does_nothing(tmp_path, capsys):
    options = ["train.max_steps=2", "evaluation.at_start=true", "evaluation.eval_period_iterations=2"]
    assert train(tmp_path, *options) == 0

    def files():
        notes = (".txt", ".png", "run_state.json")  # of this start
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(notes)}

    before = files()
    capsys.readouterr()
    assert train(tmp_path, *options) == 0
    assert files() == before
    assert "all 2 steps are done; to go on, raise optim.epochs or train.max_steps" in capsys.readouterr().err


def test_start_up_is_short(tmp_path, capsys):
    assert train(tmp_path, "train.max_steps=1", "evaluation.at_start=true") == 0
    assert len(capsys.readouterr().err.splitlines()) <= 40


def test_a_file_of_a_student_alone_gives_it(tmp_path, other):
    file = tmp_path / "student.pth"
    state = network(state_of(other, 3), "student")
    torch.save({"student": {f"module.backbone.{name}": tensor for name, tensor in state.items()}}, file)
    assert train(tmp_path / "run", f"student.pretrained_weights={file}", "train.max_steps=1", *STILL) == 0
    for name in ("student", "teacher"):
        assert_equal(network(state_of(tmp_path / "run", 0), name), state)


def test_model_weights_may_be_partial_if_that_is_allowed(tmp_path, teacher_file, capsys):
    file, state = tmp_path / "w.pth", torch.load(teacher_file, weights_only=True)
    state["teacher"] = {name: tensor for name, tensor in state["teacher"].items() if "blocks.1.norm1" not in name}
    torch.save(state, file)
    options = [f"MODEL.WEIGHTS={file}", "train.max_steps=1", *STILL]
    assert train(tmp_path / "run", *options) == 1
    assert "set student.allow_partial_weights=true to load what fits" in capsys.readouterr().err
    assert train(tmp_path / "run", *options, "student.allow_partial_weights=true") == 0
    given = {name.removeprefix("backbone."): t for name, t in state["teacher"].items() if name.startswith("backbone.")}
    assert is_equal(given, network(state_of(tmp_path / "run", 0), "student"))


def test_weights_are_no_state_to_resume(tmp_path, teacher_file, capsys):
    assert train(tmp_path, f"train.resume_path={teacher_file}") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {teacher_file}: is no checkpoint of a training run, at most its weights; "
        f"start a new run from them with student.pretrained_weights={teacher_file}"
    )


def test_a_resume_path_that_is_no_checkpoint_says_what_to_give(tmp_path, other, capsys):
    for path, sentence in {
        other: f"{other}: is the folder of a training run; give one of its checkpoints, the newest is "
        f"{other}/model_0000003",
        other / "model_0000009": f"train.resume_path={other}/model_0000009: model_0000009: there is no "
        f"model_0000009.manifest.json in {other}, so it is not complete; {other} also has model_0000003",
    }.items():
        assert train(tmp_path, f"train.resume_path={path}") == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"


@pytest.mark.parametrize("options", [(), ("--no-resume", "--overwrite")])
def test_a_run_of_the_official_code_is_left_alone(tmp_path, capsys, options):
    torch.save({"model": {"a": torch.zeros(2)}, "iteration": 9}, tmp_path / "model_0000009.rank_0.pth")
    (tmp_path / "training_metrics.json").write_text('{"iteration": 9}\n')
    assert train(tmp_path, *options) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: train.output_dir={tmp_path} holds checkpoints of another program (model_0000009.rank_0.pth), and a "
        f"run here would replace what it has written; choose another folder"
    )
    assert (tmp_path / "model_0000009.rank_0.pth").exists() and (tmp_path / "training_metrics.json").exists()
