"""One process at a time: ranks of a run, or two runs, that want the same corpus share the work on it.

data/bins.py and data/hub.py hold this while they fill a folder.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """One process at a time fills a folder; another one waits, and finds it done. The lock falls with its holder,
    however that ends. An empty folder is not left behind."""
    path = folder / ".lock"
    while True:
        file = open(path, "ab")  # noqa: SIM115
        try:
            lock(file, folder)
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
        except BaseException:
            file.close()
            raise
        file.close()  # its holder removed it meanwhile
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                file.close()  # Windows removes no open file
            path.unlink()
            for empty in (folder, folder.parent):
                empty.rmdir()
        file.close()


def lock(file: IO[bytes], folder: Path) -> None:
    """Waits until the file is this process's alone, and says so."""
    said = False
    while True:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if not said:
                print(f"waiting for another process that fills {folder.name}", file=sys.stderr)
            said = True
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return
