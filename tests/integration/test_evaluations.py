"""Every evaluation program, by its command line, on real weights and real images; their results against each other."""

import csv
import importlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from support.dist import launch
from support.moa_screen import make_moa_screen
from support.real_images import write_histology_tiles

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "eval" / "fashion_mnist_vits14.yaml"
PER_CLASS = 40
POOL = "last4+mean"
NUM_FEATURES = 384  # of one token

pytestmark = pytest.mark.integration


def evaluate(name, out, *args, weights, features):
    """Run a program; returns its results file, None of features.py."""
    main = importlib.import_module(f"dinov2.eval.{name}").main
    common = ["--config-file", str(CONFIG), "--pretrained-weights", str(weights), "--features-dir", str(features)]
    assert main([*common, "--output-dir", str(out), *args, "--num-workers", "0", "compute_precision.device=cpu"]) == 0
    path = out / f"results_eval_{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Garments:
    """Some hundred images of Fashion-MNIST whose features are kept."""

    def __init__(self, folder, weights):
        self.folder, self.weights = folder, weights
        self.train, self.val = (f"ImageFolder:root='{folder}/images':split={split}" for split in ("train", "val"))
        self.sets = ["--train-dataset", self.train, "--val-dataset", self.val]
        for part, name in (("train", self.train), ("val", self.val)):
            output = ["--output", str(folder / f"{part}.npz")]
            self.run("features", folder / "out", "--dataset", name, "--pool", POOL, *output)

    def run(self, name, out, *args):
        return evaluate(name, out, *args, weights=self.weights, features=self.folder / "features")

    def exported(self):
        """Class tokens [n, 384] float64 and labels of both sets, and the paths of the images to classify."""
        train, val = (np.load(self.folder / f"{part}.npz") for part in ("train", "val"))
        tokens = [part["features"][:, -2 * NUM_FEATURES : -NUM_FEATURES].astype(np.float64) for part in (train, val)]
        return tokens[0], train["targets"], tokens[1], val["targets"], val["column_path"].tolist()

    def kept(self):
        """Names, sizes and times of change of the files of features."""
        files = sorted((self.folder / "features").iterdir())
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.suffix != ".lock"]

    def predicted(self, out, name):
        """Predicted classes, by the names that the program gives them, in the order of `exported`."""
        found = {row["path"]: row for row in rows_of(out / f"predictions_{name}.csv")}
        return [found[path]["predicted"] for path in self.exported()[-1]]


@pytest.fixture(scope="module")
def garments(tmp_path_factory, weights):
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("needs apt-get and dpkg to fetch dataset-fashion-mnist")
    from fashion_mnist import fetch, unpack

    source = ROOT / ".cache" / "fashion_mnist"
    try:
        unpack(*fetch(source), source / "images")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"dataset-fashion-mnist cannot be fetched: {error}")
    folder = tmp_path_factory.mktemp("garments")
    for of_class in (source / "images").iterdir():
        (folder / "images" / of_class.name).mkdir(parents=True)
        for path in sorted(of_class.iterdir())[:PER_CLASS]:
            shutil.copy(path, folder / "images" / of_class.name)
    return Garments(folder, weights)


def names_of(classes, labels):
    return [classes[label] for label in labels]


def test_knn_is_scikit_learns(garments, tmp_path):
    found = garments.run("knn", tmp_path, *garments.sets, "--nb-knn", "10", "1")
    train, targets, val, _, _ = garments.exported()

    def votes(distances):
        return np.exp((1 - distances) / 0.07)

    for k, weights in ((10, votes), (1, "uniform")):
        theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(train, targets)
        right = theirs.predict(val) == garments.exported()[3]
        assert found[f"knn{k}_top1_pct"] == pytest.approx(100 * right.mean(), abs=1e-9)
        if k == 10:
            classes = sorted(path.name for path in (garments.folder / "images").iterdir())
            assert garments.predicted(tmp_path, "knn") == names_of(classes, theirs.predict(val))
    assert found["knn_top1_pct"] == found["top1_pct"] == found["knn10_top1_pct"] > 60


def test_logistic_regression_is_scikit_learns(garments, tmp_path):
    found = garments.run("log_regression", tmp_path, *garments.sets, "--c-values", "1e-4", "1e-3", "1e-2", "1e-1")
    train, targets, val, labels, _ = garments.exported()
    theirs = LogisticRegression(C=found["best_c"], tol=1e-8, max_iter=10_000).fit(train, targets)
    classes = sorted(path.name for path in (garments.folder / "images").iterdir())
    assert found["top1_pct"] == pytest.approx(100 * theirs.score(val, labels), abs=0.1)
    assert garments.predicted(tmp_path, "log_regression") == names_of(classes, theirs.predict(val))


def test_retrieval_is_knn_with_one_neighbour(garments, tmp_path):
    knn = garments.run("knn", tmp_path, *garments.sets, "--nb-knn", "1")
    found = garments.run("retrieval", tmp_path, *garments.sets)
    assert found["recall_at_1_pct"] == pytest.approx(knn["top1_pct"])
    assert found["recall_at_1_pct"] <= found["recall_at_5_pct"] <= found["recall_at_10_pct"]
    first = [row for row in rows_of(tmp_path / "hits_retrieval.csv") if row["rank"] == "1"]
    right = np.mean([row["right"] == "1" for row in first])
    assert found["recall_at_1_pct"] == pytest.approx(100 * right)
    with Image.open(tmp_path / "retrieval.png") as sheet:
        assert min(sheet.size) > 200


def test_linear_classifiers_do_as_well_as_logistic_regression(garments, tmp_path):
    found = garments.run("linear", tmp_path, *garments.sets, "--learning-rates", "0.01", "0.1", "--epochs", "2")
    other = garments.run("log_regression", tmp_path, *garments.sets, "--c-values", "1e-2", "1e-1")
    assert found["top1_pct"] > other["top1_pct"] - 8 > 50
    assert len(found["sweep"]) == 2 * 4


def test_health_sees_what_the_features_are(garments, tmp_path):
    found = garments.run("health", tmp_path, "--dataset", garments.train, "--num-alignment-images", "16")
    values = garments.exported()[0]
    values = np.linalg.svd(values, compute_uv=False)
    shares = values / values.sum()
    assert found["rankme"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert 0 < found["alignment"] < 2 and (tmp_path / "spectrum_health.png").stat().st_size > 5000


def test_programs_extract_nothing_when_the_features_are_there(garments, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise AssertionError("features are computed again")

    before = garments.kept()
    monkeypatch.setattr("dinov2.eval.feature_cache.compute_feature_files", fails)
    garments.run("knn", tmp_path, *garments.sets)
    garments.run("log_regression", tmp_path, *garments.sets, "--c-values", "0.01")
    garments.run("linear", tmp_path, *garments.sets, "--learning-rates", "0.01", "--epochs", "1")
    garments.run("retrieval", tmp_path, *garments.sets)
    garments.run("health", tmp_path, "--dataset", garments.val, "--num-alignment-images", "0")
    assert garments.kept() == before


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "options"), [("knn", []), ("log_regression", ["--c-values", "0.001", "0.01", "0.1"]), ("retrieval", [])]
)
def test_one_and_two_processes_find_the_same(garments, tmp_path, name, options):
    options = [*garments.sets, "--num-bootstrap", "100", *options]
    alone = garments.run(name, tmp_path / "alone", *options)
    common = ["--config-file", str(CONFIG), "--pretrained-weights", str(garments.weights), "--num-workers", "0"]
    command = [str(ROOT / "eval" / f"{name}.py"), *common, "--output-dir", str(tmp_path / "two")]
    command += ["compute_precision.device=cpu", *options]
    done = launch(command, num_processes=2, timeout_s=300)  # features of its own
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "two" / f"results_eval_{name}.json").read_text())
    assert {**alone, "config_digest": None} == {**together, "config_digest": None}


def test_slides_of_a_section(weights, tmp_path, caplog):
    write_histology_tiles(tmp_path / "tiles")
    dataset = f"Histology:csv=files.csv:label_col=label:slide_col=slide:root='{tmp_path}/tiles'"
    shared = {"weights": weights, "features": tmp_path / "features"}
    found = evaluate("retrieval", tmp_path, "--dataset", dataset, "--exclude-group", "slide", "--ks", "1", **shared)
    hits = [row for row in rows_of(tmp_path / "hits_retrieval.csv") if row["rank"] == "1"]
    assert all(Path(row["query"]).parent != Path(row["hit"]).parent for row in hits)
    # a neighbour of another slide, by another program
    protocol = "leave-one-group-out:column=slide:k=1"
    other = evaluate("protocols", tmp_path, "--dataset", dataset, "--protocol", protocol, **shared)
    assert found["recall_at_1_pct"] == pytest.approx(other["leave_one_group_out_column_slide_k_1_top1_pct"])
    assert "are too narrow; take them as a hint" in caplog.text


def test_a_screen_of_compounds(weights, tmp_path):
    make_moa_screen(tmp_path / "cells", sites=1)
    dataset = f"BBBC021:root='{tmp_path}/cells'"
    shared = {"weights": weights, "features": tmp_path / "features"}
    found = evaluate("bbbc021", tmp_path, "--dataset", dataset, "--num-bootstrap", "100", **shared)
    protocols = ["--protocol", "nsc", "--protocol", "nscb", "--num-bootstrap", "100"]
    other = evaluate("protocols", tmp_path, "--dataset", dataset, *protocols, **shared)
    for name in ("nsc_top1_pct", "nscb_top1_pct"):
        assert found[name] == other[name] and 0 <= found[name] <= 100
