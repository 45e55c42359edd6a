"""What a run computes with: device and dtype, memory, compilers, random numbers."""

import contextlib
import ctypes
import functools
import os
import random
import shutil
import sys
import warnings
from contextlib import AbstractContextManager
from importlib.util import find_spec

import torch
from torch import Tensor

from core import MPS_FALLBACK
from core.files import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto takes CUDA, then MPS, then the CPU. UserError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device. Use auto, cpu, cuda, cuda:N or mps.") from None
    if not there.get(device.type, False):
        raise UserError(f"--device {name}: not available here. Available: "
                        f"{', '.join(kind for kind, present in there.items() if present)}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0.")
    if device.type == "mps" and os.environ.get(MPS_FALLBACK) == "1":
        say_once("note: what MPS cannot do, the CPU does, operation by operation")
        warnings.filterwarnings("ignore", message=".*will fall back to run on the CPU")  # torch's, one an operation
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """The dtype called `name`; auto takes bfloat16 where the device multiplies it in hardware, else float32."""
    if name != "auto":
        return name
    units = torch.cpu.get_capabilities()
    fast = {"cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": units.get("avx512_bf16", False) or units.get("amx_bf16", False)}
    return "bfloat16" if fast.get(device.type) else "float32"


def compiler_of_cpp() -> bool:
    """Whether torch.compile would find a C++ compiler."""
    return any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++")))


def compiling_pays(device: torch.device, steps: int) -> bool:
    """Whether torch.compile earns back the minute it takes: on a GPU, with what it needs, in 2,000 steps or more. What
    it cannot compile then runs as it is. On a CPU the kernels of gpt/fused.c are faster, and start sooner."""
    if device.type != "cuda" or steps < 2000 or not compiler_of_cpp() or not find_spec("triton"):
        return False
    from torch import _dynamo  # takes a second

    _dynamo.config.suppress_errors = True
    return True


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for what is asked for next. By default it hands tensors of megabytes back to the
    system each time, and faulting them in again takes longer than to compute what is in them."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)          # M_MMAP_MAX: none by mmap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@functools.cache
def say_once(note: str) -> None:
    print(note, file=sys.stderr)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """The context in which the matrix products run in `dtype`; master weights stay fp32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank has a part of it (--fsdp). By an attribute, as importing DTensor takes a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor; gathered where it is sharded, so that every rank must come here."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seeds the generators of a device for one step. A step's random numbers then depend on seed, step and rank alone,
    so a resumed run, or two runs in lockstep, draw what one uninterrupted run draws: there is no state to keep."""
    mixed = random.Random(f"{seed} {step}" + f" {rank}" * (rank > 0)).getrandbits(63)
    if device.type == "cpu":
        torch.default_generator.manual_seed(mixed)  # torch.manual_seed takes 0.4 ms to remember it for a GPU to come
    else:
        torch.manual_seed(mixed)
