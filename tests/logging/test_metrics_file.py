"""Reading the end of a metrics file, however long it is and whatever a kill has left in it."""

import json

import pytest

from dinov2.logging.metrics_file import read_last_metrics, read_metrics


def write(path, *, num_lines, filling=0):
    rows = [{"iteration": step, "total_loss": step / 7, "filling": "x" * filling} for step in range(num_lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("filling", [0, 900, 5000])
@pytest.mark.parametrize("num_lines", [0, 1, 49, 50, 51, 400])
def test_the_last_lines_are_those_of_the_whole(tmp_path, num_lines, filling):
    path = tmp_path / "training_metrics.json"
    rows = write(path, num_lines=num_lines, filling=filling)
    assert list(read_metrics(path)) == rows
    assert read_last_metrics(path, 50) == rows[-50:]
    assert read_last_metrics(path, 1) == rows[-1:]


def test_of_a_long_file_only_the_end_is_read(tmp_path, monkeypatch):
    path = tmp_path / "training_metrics.json"
    rows = write(path, num_lines=20_000)
    num_read = 0
    loads = json.loads

    def count(line):
        nonlocal num_read
        num_read += 1
        return loads(line)

    monkeypatch.setattr(json, "loads", count)
    assert read_last_metrics(path, 10) == rows[-10:]
    assert num_read < 400


def test_lines_that_hold_no_step_are_left_out(tmp_path):
    path = tmp_path / "training_metrics.json"
    rows = write(path, num_lines=30, filling=500)
    with path.open("ab") as file:
        file.write(b"\x00" * 40_000 + b'\n[]\n"text"\n\xff\n{"epoch": 1}\n{"iteration": 30, "tot')
    assert read_last_metrics(path, 20) == rows[-20:]
    assert list(read_metrics(path)) == rows
