"""Result files: what they hold, and that odd names and numbers do not break them."""

import csv
import json

import numpy as np
from PIL import Image
from support.eval_predictions import predictions

from dinov2.eval.confusion_picture import draw_confusion
from dinov2.eval.results import UNKNOWN, write_confusion, write_predictions, write_results


def test_numbers_that_json_lacks_become_null(tmp_path):
    results = {"a": np.float64("nan"), "b": [np.int64(3), float("inf")], "c": np.array([0.5, np.nan]), 4: None}
    write_results(tmp_path / "r.json", results | {"path": tmp_path, "name": "broken \udcff"})
    found = json.loads((tmp_path / "r.json").read_text())
    assert found == {
        "a": None,
        "b": [3, None],
        "c": [0.5, None],
        "4": None,
        "path": str(tmp_path),
        "name": "broken \\udcff",
    }


def test_lines_of_predictions(tmp_path):
    found = predictions(
        [1, -1],
        [[1, 3], [4, 1]],
        paths=np.array(["x, y.png", "broken\udcff.png"]),
        groups=np.array([4, 4]),
        columns={"group": np.array(["part 1", "part 1"]), "plate": np.array([7, 8]), "share": np.array([1, 2])},
    )
    write_predictions(tmp_path / "p.csv", found, with_shares=True)
    first, second = csv.DictReader((tmp_path / "p.csv").open())
    assert first == {
        "place": "0",
        "path": "x, y.png",
        "group": "part 1",
        "target": "b",
        "predicted": "b",
        "is_right": "1",
        "share": "0.750000",
        "plate": "7",
        "metadata_share": "1",
        "share_a": "0.250000",
        "share_b": "0.750000",
    }
    assert (second["path"], second["target"], second["is_right"]) == ("broken\\udcff.png", UNKNOWN, "0")


def test_confusion_as_table_and_picture(tmp_path):
    confusion = np.array([[5, 1], [0, 3], [0, 0]])
    write_confusion(tmp_path / "c.csv", confusion, class_names=("a", "b"))
    assert (tmp_path / "c.csv").read_text() == "target,a,b\na,5,1\nb,0,3\n"
    confusion[2, 1] = 2
    write_confusion(tmp_path / "c.csv", confusion, class_names=("a", "b"))
    assert (tmp_path / "c.csv").read_text().endswith(f"{UNKNOWN},0,2\n")
    draw_confusion(tmp_path / "c.png", confusion, class_names=("$a^", "b\n" + "x" * 99), title="all $ of them")
    assert Image.open(tmp_path / "c.png").size > (300, 300)
    many = tuple(map(str, range(80)))
    draw_confusion(tmp_path / "many.png", np.eye(81, 80, dtype=int), class_names=many, title="many")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "c.png", "many.png"]
