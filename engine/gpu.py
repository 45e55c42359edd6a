"""Whether this machine can run the Triton kernels, asked of the driver: importing torch to find out would take longer
than a small model on the CPU needs to answer. No torch, no numpy.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig

from engine.build import NoKernel

LOWEST = (8, 0)  # the compute capability that the kernels need: int8 tensor cores fed by asynchronous copies
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@functools.cache
def capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capability of every NVIDIA GPU that this process may use, in the driver's order."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
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
    version = importlib.metadata.version("torch")
    if version.endswith("+cpu"):
        raise NoKernel(f"torch {version} is a build without CUDA (pytorch.org shows how to get one with it)")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) or not os.path.exists(header):
        raise NoKernel("Triton needs a C compiler (gcc or clang) and Python's headers (the package python3-dev)")
    return index
