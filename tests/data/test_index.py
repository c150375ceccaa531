import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import resource
import sys
import time

import numpy as np
import pytest

from dinov2.data.index import Index, Strings, counted, stored_index
from dinov2.errors import DatasetError

NAMES = [b"", b"a.png", b"caf\xe9/1.png", b"x" * 300, b""]


def example():
    return Index(
        {
            "path": Strings.pack(NAMES * 2000),
            "label": np.arange(7, dtype=np.int32) - 3,
            "share": np.linspace(0, 1, 5),
            "none": np.zeros(0, dtype=np.int64),
            "no names": Strings.pack([]),
        },
        {"classes": ["b", "a\udce9"], "count": 3},
    )


def assert_equal(one, two):
    assert one.attributes == two.attributes
    assert one.columns.keys() == two.columns.keys()
    for name in one.columns:
        assert list(one[name]) == list(two[name]), name
    assert one.digest == two.digest


def test_strings_come_back_one_by_one_and_all_together():
    packed = Strings.pack(iter(NAMES * 2000))
    assert len(packed) == 10000
    assert list(packed) == NAMES * 2000
    assert [packed[index] for index in (0, 1, 4, 9998, 9999)] == [b"", b"a.png", b"", b"x" * 300, b""]
    for index in (-1, 10000):
        with pytest.raises(IndexError, match=f"index {index} of a dataset of 10000 images"):
            packed[index]


def test_a_file_gives_back_all_columns_mapped(tmp_path):
    index = example()
    index.save(tmp_path / "x.index")
    assert os.listdir(tmp_path) == ["x.index"]
    opened = Index.open(tmp_path / "x.index")
    assert_equal(opened, index)
    assert opened["label"].dtype == np.int32
    assert not opened["label"].flags.owndata
    assert not opened["label"].flags.writeable
    assert "label" in opened
    assert "other" not in opened


def test_an_index_travels_as_the_name_of_its_file(tmp_path):
    example().save(tmp_path / "x.index")
    message = pickle.dumps(Index.open(tmp_path / "x.index"))
    assert len(message) < 500
    assert_equal(pickle.loads(message), example())
    assert_equal(pickle.loads(pickle.dumps(example())), example())
    Index({"label": np.arange(3)}).save(tmp_path / "x.index")
    with pytest.raises(DatasetError, match="x.index was replaced while it was in use; start the program again"):
        pickle.loads(message)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: b"x" + data[1:],
        lambda data: data[:40],
        lambda data: data.replace(b'"int32"', b'"int33"'),
        lambda data: data[:8] + b"\xff" * 8 + data[16:],
        lambda data: data.replace(b'"place": 0', b'"place":-9', 1),
        lambda data: data.replace(b'"columns"', b'"c_lumns"'),
    ],
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    def get():
        return stored_index(str(tmp_path), name="x", key=[1], build=example)

    get()
    (path,) = tmp_path.rglob("*.index")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert_equal(get(), example())
    assert path.read_bytes() == whole


def test_an_index_is_made_once_for_a_key_and_while_it_is_current(tmp_path):
    made = []

    def get(key, is_current=lambda index: True):
        return stored_index(
            str(tmp_path), name="x", key=key, build=lambda: made.append(key) or example(), is_current=is_current
        )

    assert_equal(get("a"), get("a"))
    get("b")
    get("a", lambda index: index.attributes["count"] == 3)
    assert made == ["a", "b"]
    get("a", lambda index: index.attributes["count"] == 4)
    assert made == ["a", "b", "a"]


def test_processes_that_ask_at_once_make_it_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    together, made = fork.Barrier(4), fork.Value("i", 0)

    def build():
        with made:
            made.value += 1
        return example()

    def ask():
        together.wait()
        assert_equal(stored_index(str(tmp_path), name="x", key=1, build=build), example())

    processes = [fork.Process(target=ask) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert made.value == 1


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    stored_index(str(tmp_path), name="x", key=1, build=example)
    (path,) = tmp_path.rglob("*.index")
    path.rename(path.with_name(f".{path.name}.123.tmp"))
    stored_index(str(tmp_path), name="x", key=1, build=example)
    assert sorted(item.suffix for item in path.parent.iterdir()) == [".index", ".lock"]


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        index = stored_index(str(tmp_path / "file"), name="x", key=1, build=example)
        assert_equal(index, example())
        assert index.path is None
    assert [record.message for record in caplog.records] == [
        f"an index of the files cannot be kept in {tmp_path}/file/index (Not a directory); each process holds its own "
        "in memory and makes it anew at each start; set data.cache_dir to a folder with space"
    ]


def test_a_full_disk_costs_a_warning_and_leaves_nothing_behind(tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        index = stored_index(str(tmp_path), name="x", key=1, build=example)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_equal(index, example())
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".lock"]
    assert caplog.records[0].levelno == logging.WARNING
    assert "(File too large)" in caplog.text


def test_without_a_cache_folder_it_stays_in_memory():
    assert stored_index(None, name="x", key=1, build=example).path is None


def test_the_header_is_json_that_a_person_can_read(tmp_path):
    example().save(tmp_path / "x.index")
    data = (tmp_path / "x.index").read_bytes()
    header = json.loads(data[16 : 16 + int.from_bytes(data[8:16], "little")])
    assert {column["name"] for column in header["columns"]} == set(example().columns)
    assert all(column["place"] % 64 == 0 for column in header["columns"])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_counting_shows_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(counted(iter(range(5000)), description="looking", unit="images")) == list(range(5000))
    assert "looking: 0 images" in terminal.getvalue()


def test_counting_writes_a_line_each_half_minute_elsewhere(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    seconds = itertools.count(0, 20)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    assert list(counted(range(20_000), description="looking")) == list(range(20_000))
    assert [record.message for record in caplog.records] == [
        "looking: files=8192 after_s=60",
        "looking: files=16384 after_s=120",
    ]
