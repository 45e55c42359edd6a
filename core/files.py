"""Files that are either whole or not there, and errors that a person can act on.

What is written as a whole goes through `atomic_file`, so a crash, a full disk or a SIGKILL never leaves half a file
under a final name; what grows line by line is cut back to whole lines by whoever resumes it. Everything a person can
get wrong is raised as `UserError` and shown by `command_line`: one or two lines on stderr, exit code 2, no traceback.
"""

import contextlib
import errno
import functools
import glob
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NOT_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)  # the machine's troubles
NO_PLACE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST)  # names where nothing can be
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # what torch says

AN_HOUR = 3600.0  # in seconds


class UserError(Exception):
    """A mistake that a person can mend. The message says the problem, the value and the remedy."""


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is fsynced and renamed to `path`, on failure removed."""
    path = Path(path)
    remove_unfinished(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    if sys.platform != "win32":  # the rename itself is durable only once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_unfinished(path: Path, older: float = AN_HOUR) -> None:
    """Removes what processes that were killed while they wrote `path` have left: .NAME.PID.tmp, files or folders, if
    they are `older` in seconds (a process may live where it is not seen from here, in another container). Also what has
    the name that this process will write to: a stranger's link would have it write elsewhere."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        found = re.fullmatch(rf"\.{re.escape(path.name)}\.([0-9]+)(\.old)?\.tmp", left.name)
        with contextlib.suppress(OSError):  # somebody else was faster
            if found and (found[1] == str(os.getpid()) or (not is_running(int(found[1])) and age(left) >= older)):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def age(path: Path) -> float:
    """Seconds since a file, or anything in a folder, was written."""
    return time.time() - max(one.lstat().st_mtime for one in (path, *(path.iterdir() if path.is_dir() else ())))


def is_running(process: int) -> bool:
    """Whether there is a process of that number. (Windows has no signal that does nothing: there all count as such.)"""
    if sys.platform == "win32":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def make_folder(path: Path, asked: str) -> None:
    """Makes a folder where there is none. asked: the flag that named it, for the UserError where nothing can be written
    there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=path))
    except OSError as error:
        raise UserError(f"{asked}: nothing can be written to {path} ({error.strerror}). Name another place.") from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 with \\n line ends, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON atomically; refuses NaN, which other JSON readers do not take."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON; a missing or broken file, or what is none (a pipe, a device), is a UserError that names it."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Is the folder a run folder, copied as a whole?") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Restore it or train the run again.") from None


def terminated(number: int, frame: Any) -> None:
    if multiprocessing.parent_process() is not None:  # a worker, which inherited this
        os._exit(128 + number)
    raise SystemExit(128 + number)


def command_line(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a script's `main`: a UserError prints and exits 2, Ctrl-C exits 130, a closed pipe ends quietly."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # text is UTF-8, whatever the locale can show of it
                stream.reconfigure(encoding="utf-8", errors="replace")
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminated)  # what is being written is removed, as by Ctrl-C
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
                raise
            print(f"error: not enough memory ({str(error).splitlines()[0] if str(error) else 'none left'}). Make the "
                  "model, the batch or the number of samples smaller.", file=sys.stderr)
            raise SystemExit(2) from None
        except BrokenPipeError:  # `generate.py | head`: the reader has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        except OSError as error:
            if error.errno not in (*NOT_OURS, *NO_PLACE):
                raise
            remedy = "Name another path." if error.errno in NO_PLACE else \
                "What was whole before is kept; make room or change permissions, and go on (training: with --resume)."
            print(f"error: {error.filename or 'writing'}: {error.strerror}. {remedy}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped
