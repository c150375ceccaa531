"""`eval/retrieval.py`: result files, hits and the contact sheet."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.evaluation import MODEL, SIZES, fails_with, write_tiny_backbone

from dinov2.data.contact_sheet import CELL
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.retrieval import main
from dinov2.eval.retrieval_scores import retrieve
from dinov2.eval.retrieval_sheet import QUERY, RIGHT, WRONG, choose_queries, write_sheet

COLOURS = {"red": (220, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 220)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders `all` and `some` of images of three colours, a little different each, and weights."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, count in (("all", 4), ("some", 2)):
        for colour, value in COLOURS.items():
            (folder / name / colour).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(value) + rng.integers(-30, 30, (20, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / name / colour / f"{number}.png")
    write_tiny_backbone(folder / "w.pth", layerscale=1.0)
    return folder


def arguments(photos, out, *more):
    fixed = ["--pretrained-weights", str(photos / "w.pth"), "--output-dir", str(out)]
    return [*fixed, "--features-dir", str(photos / "features"), "--num-workers", "0", *more, *MODEL, *SIZES]


def one_set(photos):
    return ["--dataset", f"ImageFolder:root={photos}/all"]


def results(out):
    return json.loads((out / "results_eval_retrieval.json").read_text())


def test_a_set_against_itself(photos, tmp_path, capsys):
    args = arguments(photos, tmp_path, *one_set(photos), "--ks", "1,3", "--num-hits", "5", "--num-bootstrap", "100")
    assert main(args) == 0
    found = results(tmp_path)
    assert found["recall_at_1_pct"] == found["map_pct"] == found["map_mean_per_class_pct"] == 100
    assert {"recall_at_3_pct", "r_precision_pct"} <= set(found) and "recall_at_5_pct" not in found
    assert (found["n_queries"], found["n_queries_scored"], found["n_gallery"]) == (12, 12, 12)
    with (tmp_path / "hits_retrieval.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 5
    for row in rows:
        assert row["query"] != row["hit"]
        assert int(row["right"]) == (Path(row["query"]).parent == Path(row["hit"]).parent) == (int(row["rank"]) <= 3)
    sheet = np.array(Image.open(tmp_path / "retrieval.png"))
    for colour in (QUERY, RIGHT, WRONG):
        assert (sheet == colour).all(axis=2).any()
    assert "retrieval of 12 queries in a gallery of 12, 12 of them scored" in capsys.readouterr().out


def test_queries_against_a_gallery_without_a_sheet(photos, tmp_path):
    sets = ["--train-dataset", f"ImageFolder:root={photos}/all", "--val-dataset", f"ImageFolder:root={photos}/some"]
    assert main(arguments(photos, tmp_path, *sets, "--num-sheet-queries", "0")) == 0
    found = results(tmp_path)
    assert (found["n_queries"], found["n_gallery"], found["map_pct"]) == (6, 12, 100)
    assert not (tmp_path / "retrieval.png").exists()


def test_images_of_the_same_group_are_not_compared(photos, tmp_path, capsys):
    args = arguments(photos, tmp_path, *one_set(photos), "--exclude-group", "target")
    assert fails_with(main, capsys, args, code=1).endswith(
        "no query has another image of its label to find outside its own target; there is nothing to score"
    )
    args[args.index("target")] = "slide"
    assert "has no column 'slide', which --exclude-group slide needs" in fails_with(main, capsys, args, code=1)


def test_bad_usage_is_one_sentence(photos, tmp_path, capsys):
    args = arguments(photos, tmp_path, *one_set(photos))
    assert fails_with(main, capsys, [*args, "--ks", "1,x"], code=2) == (
        "error: --ks 1,x: must be whole numbers of at least 1 with commas, e.g. 1,5,10"
    )
    assert fails_with(main, capsys, [*args, "--exclude-group", "a,,b"], code=2) == (
        "error: --exclude-group 'a,,b': a name is empty; write e.g. plate or slide,patient"
    )
    assert fails_with(main, capsys, [*args, "--num-hits", "0"], code=2) == "error: --num-hits 0: must be at least 1"
    assert fails_with(main, capsys, [*args, "--num-sheet-queries", "-1"], code=2) == (
        "error: --num-sheet-queries -1: must be at least 0"
    )


class Squares:
    """Grey images by place; the user's own class, which transforms them already."""

    def __getitem__(self, index):
        return torch.full((1, 8, 8), float(index)) + torch.arange(8) / 8, None


def retrieved(targets):
    values = torch.tensor([[1, 0], [1, 0.1], [0, 1], [0.2, 1]])
    features = FeatureSet(name="SQUARES", values=values, targets=np.array(targets), places=np.arange(4))
    return retrieve(features, features, device=torch.device("cpu"))


def test_the_sheet_shows_queries_from_the_worst_to_the_best():
    found = retrieved([0, 1, 1, 0])
    assert (np.diff(found.average_precision[choose_queries(found, 4)]) >= 0).all()
    assert len(choose_queries(found, 10)) == 4
    assert choose_queries(retrieved([-1] * 4), 2).tolist() == [0, 3]


def test_a_sheet_without_labels_and_paths_has_no_coloured_frames(tmp_path):
    write_sheet(
        retrieved([-1] * 4),
        tmp_path / "sheet.png",
        queries=Squares(),
        gallery=Squares(),
        num_queries=2,
        num_shown=2,
        heading="squares",
    )
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] > 3 * CELL
    assert not any((sheet == colour).all(axis=2).any() for colour in (RIGHT, WRONG))


def test_help_tells_defaults(capsys):
    assert main(["--help"]) == 0
    assert "default: 1,5,10" in " ".join(capsys.readouterr().out.split())
