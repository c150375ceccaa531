"""`eval/knn.py`, and k-NN while training, on scikit-learn's digits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.dist import launch
from support.evaluation import MODEL, SIZES, fails_with, tiny_backbone, write_tiny_backbone
from support.industrial_json import make_grouped_json

from dinov2.configs import load_config
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.knn import main
from dinov2.eval.knn_online import OnlineKnn

ROOT = Path(__file__).resolve().parents[2]
DATA = ["--train-dataset", "Digits:split=TRAIN", "--val-dataset", "Digits:split=VAL"]
ONLINE = [
    "evaluation.knn.train_dataset_path=Digits:split=TRAIN",
    "evaluation.knn.val_dataset_path=Digits:split=VAL",
    "evaluation.knn.nb_knn=[5, 10]",
    "train.num_workers=0",
]
CPU = torch.device("cpu")


@pytest.fixture
def weights(tmp_path):
    return write_tiny_backbone(tmp_path / "teacher_checkpoint.pth")


def arguments(weights, tmp_path, *more):
    fixed = ["--pretrained-weights", str(weights), *DATA, "--output-dir", str(tmp_path / "out"), "--num-workers", "0"]
    return [*fixed, *more, *MODEL, *SIZES]


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results_eval_knn.json").read_text())


def test_program_writes_results_and_a_table(weights, tmp_path, capsys):
    args = arguments(
        weights, tmp_path, "--n-per-class-list", "-1", "5", "--n-tries", "2", "--nb_knn", "10", "5", "9999"
    )
    assert main(args) == 0
    found = results(tmp_path)
    assert found["knn_top1_pct"] == found["knn10_top1_pct"] > 30  # chance is 10
    assert (found["n_train"], found["n_val"], found["n_classes"], found["n_features"]) == (1198, 599, 10, 48)
    assert [(score["n_per_class"], score["k"]) for score in found["few_shot"]] == [(5, 5)]
    assert found["weights"] == str(weights) and {"dinov2-adapt", "torch", "python"} < set(found["versions"])
    captured = capsys.readouterr()
    table = captured.out.splitlines()
    assert table[0] == "k-NN on 1198 training and 599 validation images, 10 classes, 48 features"
    assert "group" not in "".join([*table[:5], *found]).replace("n_val_groups", "")
    assert [line.split()[:2] for line in table[2:5]] == [["all", "10"], ["all", "5"], ["5", "5"]]
    assert found["top1_pct"] == pytest.approx(found["knn_top1_pct"])  # of all metrics the headline is at the first k
    assert found["balanced_accuracy_pct"] == pytest.approx(found["knn_mean_per_class_pct"])
    assert "k-NN leaves out k=[9999]: Digits:split=TRAIN has only 1198 labelled images" in captured.err
    assert (tmp_path / "out" / "logs" / "log.txt").is_file()


@pytest.mark.integration
@pytest.mark.dist
def test_program_gives_the_same_on_two_processes(weights, tmp_path):
    assert main(arguments(weights, tmp_path)) == 0
    alone = results(tmp_path)
    done = launch([str(ROOT / "eval" / "knn.py"), *arguments(weights, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("k-NN on 1198") == 1
    assert results(tmp_path) == alone


def test_options_stand_for_keys_and_overrule_the_file(weights, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("evaluation: {knn: {nb_knn: [7], temperature: 0.5, batch_size: 64}}\nstudent: {depth: 2}\n")
    assert main(arguments(weights, tmp_path, "--config-file", str(config))) == 0
    assert results(tmp_path)["temperature"] == 0.5 and "knn7_top1_pct" in results(tmp_path)
    more = ["--config", str(config), "--temperature", "0.1", "--nb-knn", "3"]
    assert main(arguments(weights, tmp_path, *more)) == 0
    assert results(tmp_path)["temperature"] == 0.1 and "knn7_top1_pct" not in results(tmp_path)


def test_two_backbones_are_compared_and_a_test_set_is_classified(weights, tmp_path, capsys):
    compare = ["--compare-to", str(weights), "--num-bootstrap", "100"]
    data = ["--val-dataset", "Digits:split=TRAIN", "--test-dataset", "Digits:split=VAL"]
    assert main(arguments(weights, tmp_path, *compare, "--nb-knn", "10")) == 0
    found = results(tmp_path)
    assert main(arguments(weights, tmp_path, *data, "--nb-knn", "10")) == 0
    assert results(tmp_path)["knn_top1_pct"] == found["knn_top1_pct"] == found["compare_to"]["scores"]["knn_top1_pct"]
    assert (
        "the k of k-NN are given, so nothing is chosen on Digits:split=TRAIN; Digits:split=VAL is classified"
        in capsys.readouterr().err
    )


def test_online_score_is_that_of_the_program(weights, tmp_path):
    assert main(arguments(weights, tmp_path, "--nb_knn", "5", "10")) == 0
    cfg = load_config(None, [*MODEL, *SIZES, *ONLINE, f"train.output_dir={tmp_path}"])
    knn = OnlineKnn.from_config(cfg, device=CPU)
    scores = knn.score(*knn.extract(tiny_backbone()))[0].named_scores()
    assert [name for name in scores if name.endswith("_top1_pct")] == [
        "knn_top1_pct",
        "knn5_top1_pct",
        "knn10_top1_pct",
    ]
    assert scores == {name: results(tmp_path)[name] for name in scores}


def test_a_wrong_path_fails_before_training(tmp_path):
    keys = [*MODEL, *SIZES, *ONLINE, f"evaluation.knn.val_dataset_path=ImageFolder:root={tmp_path}/none"]
    with pytest.raises(DatasetError, match="does not exist"):
        OnlineKnn.from_config(load_config(None, keys), device=CPU)
    keys[-1] = "evaluation.knn.val_dataset_path=Digitz:split=VAL"
    with pytest.raises(ConfigError, match="Digitz"):
        OnlineKnn.from_config(load_config(None, keys), device=CPU)


def test_bad_usage_is_one_sentence_and_code_2(weights, tmp_path, capsys):
    args = arguments(weights, tmp_path)
    without = [text for text in args if text not in ("--pretrained-weights", str(weights))]
    assert fails_with(main, capsys, without, code=2) == (
        "error: --pretrained-weights is not given; name the file with the backbone to evaluate"
    )
    place = args.index("--val-dataset")
    # the config's own check speaks first when one of the two is missing
    assert fails_with(main, capsys, args[:place] + args[place + 2 :], code=2).startswith("error: evaluation.knn.")
    start = args.index("--train-dataset")
    assert fails_with(main, capsys, args[:start] + args[start + 4 :], code=2) == (
        "error: evaluation.knn.train_dataset_path (--train-dataset) is not set; "
        "name labelled images, e.g. ImageFolder:root=photos"
    )
    assert fails_with(main, capsys, [*args, "--n-tries", "0"], code=2) == "error: --n-tries 0: must be at least 1"
    assert fails_with(main, capsys, [*args, "--n-per-class-list", "0"], code=2) == (
        "error: --n-per-class-list 0: must be at least 1, or -1 for all"
    )
    assert fails_with(main, capsys, [*args, "--nb_knn", "0"], code=2).startswith(
        "error: evaluation.knn.nb_knn=[0]: must be"
    )
    assert fails_with(main, capsys, [*args, "student.archh=x"], code=2).startswith("error: unknown key student.archh")
    assert "unrecognized arguments: --frobnicate" in fails_with(main, capsys, [*args, "--frobnicate"], code=2)


def test_an_unwritable_output_folder_is_named(weights, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert fails_with(main, capsys, arguments(weights, tmp_path), code=2) == (
        f"error: --output-dir {tmp_path}/out: cannot be written (File exists); choose another"
    )


def test_failures_are_one_sentence_and_code_1(weights, tmp_path, capsys):
    args = arguments(weights, tmp_path)
    assert fails_with(main, capsys, [*args, "student.embed_dim=96"], code=1) == (
        f"error: {weights}: its embedding has 48 features but the model's has 96; set student.embed_dim=48"
    )
    args[1] = str(tmp_path / "none.pth")
    assert fails_with(main, capsys, args, code=1) == f"error: {tmp_path}/none.pth: no such file of weights"


def test_help_tells_defaults():
    done = subprocess.run([sys.executable, ROOT / "eval" / "knn.py", "--help"], capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    for part in ("(default 10 20 100 200)", "(default 0.07)", "(default 256)", "default: teacher", "default: -1"):
        assert part in text


def test_groups_in_both_sets_are_refused(weights, tmp_path, capsys):
    root = tmp_path / "parts"
    make_grouped_json(root)
    keys = [*arguments(weights, tmp_path)]
    for option, split in (("--train-dataset", "all"), ("--val-dataset", "val")):
        keys[keys.index(option) + 1] = f"GroupedJSON:root={root}:split={split}"
    sentence = fails_with(main, capsys, keys, code=1)
    assert "has images both in GroupedJSON:root=" in sentence and "move each group to one of them" in sentence
    keys[keys.index("--train-dataset") + 1] = f"GroupedJSON:root={root}:split=train"
    assert main(keys) == 0


def test_a_set_that_classifies_itself_is_warned_about(weights, tmp_path, capsys):
    keys = [*arguments(weights, tmp_path)]
    keys[keys.index("--train-dataset") + 1] = keys[keys.index("--val-dataset") + 1]
    assert main(keys) == 0
    assert "is learned from and reported on" in capsys.readouterr().err


def test_groups_are_scored_beside_images(weights, tmp_path, capsys):
    root = tmp_path / "parts"
    make_grouped_json(root)
    train, val = (f"GroupedJSON:root={root}:split={split}" for split in ("train", "val"))
    keys = [*arguments(weights, tmp_path, "--nb_knn", "3", "1")]
    keys[keys.index("--train-dataset") + 1], keys[keys.index("--val-dataset") + 1] = train, val
    assert main(keys) == 0
    names = ["knn_group_top1_pct", "knn3_group_top1_pct", "knn1_group_top1_pct"]
    found = results(tmp_path)
    assert [name for name in found if "_group_" in name] == names and found["n_val_groups"] == 6
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "k-NN on 18 training and 18 validation images in 6 groups, 2 classes, 48 features"
    assert table[1].endswith("  group top-1 %")
    assert [float(line.split()[-1]) for line in table[2:4]] == pytest.approx(
        [found[name] for name in names[1:]], abs=0.01
    )
    online = [f"evaluation.knn.{part}_dataset_path={name}" for part, name in (("train", train), ("val", val))]
    cfg = load_config(
        None, [*MODEL, *SIZES, *ONLINE, *online, "evaluation.knn.nb_knn=[3, 1]", f"train.output_dir={tmp_path}"]
    )
    knn = OnlineKnn.from_config(cfg, device=CPU)
    scores = knn.score(*knn.extract(tiny_backbone()))[0].named_scores()
    assert {name: scores[name] for name in names} == {name: found[name] for name in names}
