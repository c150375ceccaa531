"""Run a program's body: errors of the user become one line and an exit code, never a traceback."""

import errno
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dinov2.distributed.launch_environment import LaunchEnvironment, read_launch_environment
from dinov2.errors import ConfigError, Dinov2Error, StoppedEarly, TrainingError
from dinov2.logging.text_logs import FILE_ONLY

logger = logging.getLogger(__name__)

_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_program(fn: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Call `fn(argv)` and return the exit code of the program.

    With several processes a `ConfigError`, which all of them meet, is shown by rank 0 alone; other errors by every
    rank that has one, with its number. Errors are also written to the log file; unforeseen ones are raised on.

    Args:
        fn: returns the exit code.
        argv: command-line arguments without the program's name; None: those of the process.

    Returns:
        What `fn` returns or exits with; else an error's own code (1, or 2 for usage and config); 0 if it was told to
        stop and had nothing to save, but 130 after Ctrl-C; 1 when the reader of standard output has gone, or the disk
        is full.
    """
    try:
        return fn(argv)
    except Dinov2Error as error:
        _report(error)
        return error.exit_code
    except StoppedEarly as error:
        _tell_of_stop(error)
        return 0
    except SystemExit as error:  # argparse, on --help and on bad usage
        return _exit_code(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
            file = f" {error.filename}" if error.filename else ""
            _report(TrainingError(f"cannot write{file} ({error.strerror}); free some space and start again"))
            return TrainingError.exit_code
        if logger.hasHandlers():
            logger.critical("unforeseen error", exc_info=True, extra=FILE_ONLY)
        raise


def end_program(code: int) -> NoReturn:
    """End this process with an exit code, which a signal that comes now does not change.

    One of several processes ends without running C++ destructors: the threads of a process group may outlive it, and
    then abort the process ("terminate called without an active exception", seen now and then under gloo), so that a
    launcher counts a run as failed that has saved and finished. Call it when everything is closed.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if _launch_environment().world_size > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _report(error: Dinov2Error) -> None:
    launch = _launch_environment()
    message = " ".join(str(error).split())
    if logger.hasHandlers():  # without any, Python itself would show the line a second time
        logger.error("%s", message, extra=FILE_ONLY)
    if isinstance(error, ConfigError):
        if launch.rank == 0:
            print(f"error: {message}", file=sys.stderr)
        return
    prefix = f"rank {launch.rank}: " if launch.world_size > 1 else ""
    print(f"error: {prefix}{message}", file=sys.stderr)


def _tell_of_stop(error: StoppedEarly) -> None:
    sentence = f"stopped by {error} before the first step; start again to go on"
    if logger.hasHandlers():
        logger.info("%s", sentence, extra=FILE_ONLY)
    if _launch_environment().rank == 0:
        print(sentence, file=sys.stderr)


def _launch_environment() -> LaunchEnvironment:
    """Ask the launcher, because the process group may be gone or not yet there."""
    try:
        return read_launch_environment(os.environ)
    except ConfigError:  # this may be the very error to report
        return LaunchEnvironment()


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _is_stdout_closed() -> bool:
    """Tell whether the reader of standard output has gone, and if so keep Python from complaining at exit."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # captured, or closed by the program itself
        return False
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    is_closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return is_closed
