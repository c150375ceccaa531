"""Text logs: `logs/log.txt` for rank 0, `logs/log.txt.rank1` and so on for the others, and rank 0 on the console.

Log lines and the progress bar go to standard error; standard output is left to results.
"""

import logging
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from dinov2.errors import ConfigError

CONSOLE_FORMAT = "%(levelname)s %(name)s %(message)s"
FILE_FORMAT = f"%(asctime)s {CONSOLE_FORMAT}"
FILE_ONLY = {"file_only": True}  # as `extra` of a log call: what the console shows in another form already
_OURS = ("dinov2", "data_adapters")


class _ConsoleHandler(logging.Handler):
    """Write lines to standard error without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as every handler of the standard library: a log line never ends a run
            self.handleError(record)


class _FileHandler(logging.FileHandler):
    """A handler of our own type, so that a second set-up can find and replace it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a line that a full disk has no room for: the checkpoint or metrics that come next say so."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def setup_logging(output_dir: str | Path | None, *, rank: int, level: str = "INFO") -> None:
    """Send log records to the rank's file and, on rank 0, to the console; call once, at the start of a program.

    A second call replaces the first one's outputs. Python warnings are logged too. Other packages are shown from
    warnings on.

    Args:
        output_dir: folder of the run, made if absent; files are appended to. None: no file.
        rank: of this process.
        level: lowest level shown of this project's own records.

    Raises:
        ConfigError: the folder or file cannot be written.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _ConsoleHandler | _FileHandler)]:
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = []
    if output_dir is not None:
        handlers.append(_open_file(Path(output_dir), rank=rank))
        handlers[-1].setFormatter(logging.Formatter(FILE_FORMAT))
    if rank == 0:
        handlers.append(_ConsoleHandler())
        handlers[-1].setFormatter(logging.Formatter(CONSOLE_FORMAT))
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    # Our backbones return views of packed tokens, and nothing changes these in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    logging.captureWarnings(True)


def _open_file(output_dir: Path, *, rank: int) -> _FileHandler:
    path = output_dir / "logs" / ("log.txt" if rank == 0 else f"log.txt.rank{rank}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"train.output_dir={output_dir}: cannot write {path} ({error.strerror}); choose a folder that is writable"
        ) from error
