"""Compiles C kernels at first use, with the system's own compiler, into a cache.

    compile_kernels(path / "cpu.c")     # for this very CPU; another name of ISAS: for less, which the tests force

The cache is $XDG_CACHE_HOME/bitgpt (~/.cache/bitgpt); a library's name holds a hash of its source, flags, compiler
and CPU, so what is there always fits. Two processes may compile at once: each renames its own file into place.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from core.files import atomic_file

KERNELS = Path(__file__).resolve().parent
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas")
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")
ISAS = {"auto": ("-mcpu=native",) if ARM else ("-march=native",), "avx512": ("-march=native", "-mno-amx-int8"),
        "cascadelake": ("-march=cascadelake",),  # the least AVX-512 of all: no permutation of bytes, no bf16
        "avxvnni": ("-march=x86-64-v3", "-mavxvnni"), "avx2": ("-march=x86-64-v3",),
        "scalar": ("-march=x86-64",) if X86 else ()}


class NoKernel(Exception):
    """Kernels, in C or in Triton, cannot run here. The message says why; who would run them falls back on torch."""


def compiler() -> list[str]:
    """$CC, or the first of cc, gcc, clang. NoKernel where there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        try:
            command = shlex.split(name)
        except ValueError as error:
            raise NoKernel(f"CC is {name!r}, which is no command ({error})") from None
        if command and shutil.which(command[0]):
            return command
        if command and name == os.environ.get("CC"):
            raise NoKernel(f"CC is {name!r}, and there is no such command")
    raise NoKernel("no C compiler (cc, gcc or clang) is installed")


def cpu_flags() -> str:
    """What distinguishes one CPU from another to the compiler."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def cache_folder() -> Path:
    """A folder of this user's own that can be written to."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (Path(home) / "bitgpt", Path(tempfile.gettempdir()) / f"bitgpt-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                return folder
        except OSError:
            continue
    raise NoKernel(f"neither {home} nor {tempfile.gettempdir()} can hold the compiled kernels")


def compile_kernels(source: Path, isa: str = "auto", sanitize: bool = False, openmp: bool = False) -> Path:
    """The path of a C file's library, compiled now where the cache has none. openmp: compiled with OpenMP but linked
    without, so that it runs on the OpenMP threads that torch has already. NoKernel where it cannot be compiled."""
    if os.name != "posix":
        raise NoKernel("the C kernels need POSIX threads")
    command = compiler()
    flags = [*FLAGS, *(["-fopenmp"] if openmp else ()), *(SANITIZE if sanitize else ()), *ISAS[isa]]
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoKernel(f"{command[0]} does not run ({error})") from None
    key = hashlib.sha256(repr((command, flags, version, cpu_flags())).encode())
    for file in (source, *sorted(source.parent.glob("*.h")), *sorted(KERNELS.glob("*.h"))):
        key.update(file.read_bytes())
    path = cache_folder() / f"{source.stem}-{key.hexdigest()[:24]}.so"
    if path.exists():
        return path
    start = time.perf_counter()
    print(f"compiling the {source.stem} kernels ({isa}) with {command[0]} ...", end=" ", file=sys.stderr, flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder, atomic_file(path) as linked:
            compiled = Path(folder) / "kernels.o"
            for step in ([*flags, "-c", "-o", compiled, source],
                         [*(SANITIZE if sanitize else ()), "-shared", "-pthread", "-o", linked, compiled, "-lm"]):
                done = subprocess.run([*command, *map(str, step)], capture_output=True, text=True, timeout=120)
                if done.returncode:
                    print("failed", file=sys.stderr)
                    lines = done.stderr.splitlines() or ["?"]
                    errors = [line for line in lines if "error" in line] or lines
                    raise NoKernel(f"{command[0]} could not compile the kernels: {errors[0]}")
    except (OSError, subprocess.SubprocessError) as error:
        raise NoKernel(f"{command[0]} could not compile the kernels: {error}") from None
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return path
