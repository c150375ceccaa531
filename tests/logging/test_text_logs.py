"""Where log records go."""

import logging
import os
import warnings

import pytest

from dinov2.errors import ConfigError
from dinov2.logging import setup_logging


def test_main_rank_writes_file_and_console(tmp_path, capsys):
    setup_logging(tmp_path / "run", rank=0)
    logging.getLogger("dinov2.train").info("step=%d loss=%.1f", 3, 9.0)
    assert capsys.readouterr() == ("", "INFO dinov2.train step=3 loss=9.0\n")
    written = (tmp_path / "run" / "logs" / "log.txt").read_text()
    assert written.endswith(" INFO dinov2.train step=3 loss=9.0\n") and written.count("\n") == 1


def test_other_ranks_write_their_own_file_only(tmp_path, capsys):
    setup_logging(tmp_path, rank=1)
    logging.getLogger("dinov2.data").warning("skipped=1")
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "logs" / "log.txt.rank1").read_text().endswith(" WARNING dinov2.data skipped=1\n")
    assert not (tmp_path / "logs" / "log.txt").exists()


def test_a_second_call_replaces_the_first_and_files_are_appended_to(tmp_path, capsys):
    for _ in range(2):
        setup_logging(tmp_path, rank=0)
        logging.getLogger("dinov2").info("hello")
    assert capsys.readouterr().err == "INFO dinov2 hello\n" * 2
    assert (tmp_path / "logs" / "log.txt").read_text().count("hello") == 2


def test_other_packages_are_shown_from_warnings_on(capsys):
    setup_logging(None, rank=0)
    logging.getLogger("fvcore").info("chatter")
    logging.getLogger("fvcore").warning("trouble")
    logging.getLogger("dinov2").debug("detail")
    assert capsys.readouterr().err == "WARNING fvcore trouble\n"


def test_python_warnings_are_logged(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        setup_logging(None, rank=0)
        warnings.warn("old thing", UserWarning, stacklevel=1)
        logging.captureWarnings(False)
    assert "WARNING py.warnings" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        setup_logging(tmp_path, rank=0)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError) as caught:
        setup_logging(tmp_path / "run", rank=0)
    assert str(caught.value) == (
        f"train.output_dir={tmp_path}/run: cannot write {tmp_path}/run/logs/log.txt (Not a directory); "
        "choose a folder that is writable"
    )
