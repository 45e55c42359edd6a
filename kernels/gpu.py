"""Whether this machine can run the Triton kernels, asked of the driver: importing torch to find out would take longer
than a small model on the CPU needs to answer. No torch, no numpy; Triton where there is a GPU for it.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig

from kernels.build import NoKernel

LOWEST = (8, 0)  # the compute capability that the kernels need: int8 tensor cores fed by asynchronous copies
OLDEST = (3, 5)  # Triton, of torch 2.9: with an older one no kernel can wait for the previous one
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@functools.cache
def library() -> ctypes.CDLL | None:
    """The driver's library, where there is one."""
    with contextlib.suppress(OSError):
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    return None


def has_dependent_launch(major: int) -> bool:
    """Whether CUDA graphs on a GPU of compute capability `major` may hold launches that begin before the one before
    has ended: from Hopper and CUDA 12.3 on."""
    driver, version = library(), ctypes.c_int()
    return major >= 9 and driver is not None and not driver.cuDriverGetVersion(ctypes.byref(version)) and (
        version.value >= 12030)


@functools.cache
def capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capability of every NVIDIA GPU that this process may use, in the driver's order."""
    driver = library()
    if driver is None:
        return ()
    count, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()

    def attribute(which: int, device: int) -> int:
        return 0 if driver.cuDeviceGetAttribute(ctypes.byref(value), which, device) else value.value

    return tuple((attribute(MAJOR, i), attribute(MINOR, i)) for i in range(count.value))


def require(device: str = "auto") -> int:
    """The number of the GPU that `device` (auto, cuda, cuda:N) names. NoKernel, with the reason, where the Triton
    kernels cannot run on it."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cuda") or (number and not number.isdecimal()):
        raise NoKernel(f"it runs on NVIDIA GPUs, not on --device {device}")
    found, index = capabilities(), int(number or 0)
    if not found:
        raise NoKernel("no NVIDIA GPU, or no driver for it, on this machine")
    if index >= len(found):
        raise NoKernel(f"this machine has {len(found)} NVIDIA GPU(s), from cuda:0")
    if found[index] < LOWEST:
        raise NoKernel("the GPU has compute capability {}.{}, the kernels need {}.{} (Ampere, 2020) or more".format(
            *found[index], *LOWEST))
    if importlib.util.find_spec("triton") is None:
        raise NoKernel("the package triton is not installed (PyTorch's CUDA build for Linux brings it)")
    version = importlib.import_module("triton").__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        raise NoKernel(f"triton {version} is too old: {'.'.join(map(str, OLDEST))} is needed, which torch 2.9 brings")
    version = importlib.metadata.version("torch")
    if version.endswith("+cpu"):
        raise NoKernel(f"torch {version} is a build without CUDA (pytorch.org shows how to get one with it)")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) or not os.path.exists(header):
        raise NoKernel("Triton needs a C compiler (gcc or clang) and Python's headers (the package python3-dev)")
    return index
