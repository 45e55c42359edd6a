"""Compiles the C kernels at first use, with the system's own compiler, into a cache.

    library("auto")     for this very CPU; another name of ISAS: for less, which the tests force

The cache is $XDG_CACHE_HOME/bitgpt (~/.cache/bitgpt); a library's name holds a hash of its source, flags, compiler
and CPU, so what is there always fits. Two processes may compile at once: each renames its own file into place.
"""

import ctypes
import functools
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

from core.files import UserError, atomic_file

ENGINE = Path(__file__).resolve().parent
# The libraries: the inference engine, and the training step (gpt/fused.py). The latter is compiled with -fopenmp but
# linked without, so that it runs on the OpenMP threads that torch has already.
SOURCES = {"cpu": ENGINE / "cpu.c", "fused": ENGINE.parent / "gpt" / "fused.c"}
OPENMP = {"cpu": (), "fused": ("-fopenmp",)}
HEADERS = sorted(path for room in ("engine", "gpt") for path in (ENGINE.parent / room).glob("*.h"))
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


def compile_kernels(name: str = "cpu", isa: str = "auto", sanitize: bool = False) -> Path:
    """The path of a compiled library of SOURCES, made now where the cache has none. NoKernel where that fails."""
    if os.name != "posix":
        raise NoKernel("the C kernels need POSIX threads")
    command = compiler()
    flags = [*FLAGS, *OPENMP[name], *(SANITIZE if sanitize else ()), *ISAS[isa]]
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoKernel(f"{command[0]} does not run ({error})") from None
    key = hashlib.sha256(repr((command, flags, version, cpu_flags())).encode())
    for file in (SOURCES[name], *HEADERS):
        key.update(file.read_bytes())
    path = cache_folder() / f"{name}-{key.hexdigest()[:24]}.so"
    if path.exists():
        return path
    start = time.perf_counter()
    print(f"compiling the {name} kernels ({isa}) with {command[0]} ...", end=" ", file=sys.stderr, flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder, atomic_file(path) as linked:
            compiled = Path(folder) / "kernels.o"
            for step in ([*flags, "-c", "-o", compiled, SOURCES[name]],
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


class Shape(ctypes.Structure):
    """struct shape of cpu.c"""

    _fields_ = [(name, ctypes.c_int) for name in (
        "n_layer", "n_head", "n_kv_head", "n_embd", "n_ff", "block_size", "vocab_size", "relu2",
        "tied", "ternary", "kv_bf16", "threads")]


@functools.cache
def library(isa: str = "auto", sanitize: bool = False) -> ctypes.CDLL:
    """The loaded kernels, with the types of their functions. NoKernel where they cannot be compiled or loaded."""
    if isa not in ISAS:
        raise UserError(f"instruction set {isa!r} is not known. Choose from: {', '.join(ISAS)}.")
    try:
        lib = ctypes.CDLL(str(compile_kernels("cpu", isa, sanitize)))
    except OSError as error:
        raise NoKernel(f"the compiled kernels do not load ({error})") from None
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    for name, result, arguments in (
            ("isa", ctypes.c_char_p, []),
            ("create", pointer, [ctypes.POINTER(Shape), real, pointer, pointer]),
            ("destroy", None, [pointer]),
            ("matrix", integer, [pointer] + [integer] * 5 + [pointer, pointer, integer]),
            ("norm", integer, [pointer, integer, integer, integer, pointer]),
            ("reset", integer, [pointer, integer]),
            ("forward", integer, [pointer, pointer, integer, integer, pointer]),
            ("threads", integer, [pointer]),
            ("count_invalid", ctypes.c_int64, [integer, pointer, ctypes.c_int64]),
            ("product", integer, [integer] * 3 + [pointer] * 2 + [integer] + [pointer] * 4),
            ("bandwidth", ctypes.c_double, [pointer, ctypes.c_int64, integer, integer, integer])):
        function = getattr(lib, f"bitgpt_{name}")
        function.restype, function.argtypes = result, arguments
    assert ctypes.c_int.in_dll(lib, "bitgpt_shape_bytes").value == ctypes.sizeof(Shape)
    return lib
