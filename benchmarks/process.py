"""What the benchmarks share: processes of their own for what is measured, what memory they took, and where results go.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from core.config import did_you_mean
from core.files import UserError, make_folder

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, str(ROOT / "bench.py"), "worker")  # MODULE and its specification as JSON


def of_proc(file: str, key: str) -> str:
    """What Linux says of `key` in /proc/FILE, "" where it says nothing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def peak_memory() -> int:
    """Bytes of memory that this process has used at most."""
    if most := of_proc("self/status", "VmHWM"):  # getrusage would also count the process that started this one
        return 1024 * int(most.split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Worker:
    """A process that runs `worker` of a module here: it holds one engine or model, and measures when asked."""

    def __init__(self, name: str, module: str, **spec: Any) -> None:
        self.name = name
        self.process = subprocess.Popen([*COMMAND, module, json.dumps(spec)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env={**os.environ, "OMP_NUM_THREADS": str(spec["threads"])})
        self.about = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.name} ended (exit code {self.process.wait()}); out of memory? "
                            "Leave it out with --engines.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, what: str, batch: int = 1, length: float = 0) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, batch, length]) + "\n")
        self.process.stdin.flush()
        return self.answer()["value"]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def cpu_name() -> str:
    return of_proc("cpuinfo", "model name") or platform.processor() or platform.machine()


def names_of(text: str, known: Collection[str], flag: str) -> list[str]:
    """Names separated by commas. UserError for one that is not known, and for none at all."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: {name!r} is not known.{did_you_mean(name, known)} "
                            f"Choose from: {', '.join(known)}.")
    if not names:
        raise UserError(f"{flag} {text!r} names none. Choose from: {', '.join(known)}.")
    return names


def place(save: str) -> Path:
    """Where results go, without an ending, with the folder for it. Asked for before anything is measured."""
    path = Path(save.removesuffix(".json"))
    make_folder(path.parent, f"--save {save}")
    return path
