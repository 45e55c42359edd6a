"""Safetensors files as numpy arrays: views of the mapped file, or of memory in 2 MB pages. No torch; and nothing is
taken on trust, for a file may be a stranger's.

The layout: 8 bytes with the length of a JSON header, the header (name -> dtype, shape, offsets), the tensors one behind
the other.
"""

import contextlib
import json
import math
import mmap
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from core.files import UserError

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = {"U8": np.uint8, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "I32": np.int32,
          "I64": np.int64, "F64": np.float64, "BOOL": np.bool_, "U16": np.uint16, "U32": np.uint32, "I16": np.int16}
MAPPED_FROM, HUGE_SHARE = 64 << 20, 0.9  # a file that is mapped has so many bytes, and so much of it in 2 MB pages


def header(specs: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], align: int = 8) -> bytes:
    """How a file begins whose tensors (name, dtype, shape) follow each other from a multiple of `align` bytes on."""
    content: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, dtype, shape in specs:
        end = at + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(content).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text


def open_safetensors(path: Path, into_memory: bool = False) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; the arrays are views of the mapped file, or, into_memory, of 2 MB
    pages: mapped ones where that can be, else memory that it is read into. UserError where the header promises what
    the file does not hold; nothing is read beyond its end."""
    problem = f"{path} is damaged or cut short"
    remedy = "Remove it, and it is made again from the checkpoint." if path.name.startswith("model.") \
        else "Restore it from a copy, or train the run again."
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is not a file. {remedy}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{problem} (a header of {length} bytes in a file of {size}). {remedy}")
            header = json.loads(file.read(length))
            whole = mapped_huge(file, size) if into_memory else np.frombuffer(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            data = read_huge(file, size - 8 - length) if whole is None else whole[8 + length:]
        metadata = header.pop("__metadata__", {})
        tensors, ranges = {}, []
        for name, entry in header.items():
            shape, (begin, end), dtype = entry["shape"], entry["data_offsets"], np.dtype(DTYPES[entry["dtype"]])
            if any(type(n) is not int or n < 0 for n in [*shape, begin, end]):
                raise ValueError(f"{name} has impossible sizes")
            if not begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} lies outside the file")
            tensors[name] = np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape)
            ranges.append((begin, end, name))
        ranges.sort()
        for (_, end, _), (begin, _, name) in zip(ranges, ranges[1:], strict=False):
            if begin < end:
                raise ValueError(f"{name} overlaps another tensor")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Train the run first.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{problem} ({error}). {remedy}") from None
    return tensors, metadata


def mapped_huge(file: BinaryIO, size: int) -> Array | None:
    """The whole file, mapped, if the kernel maps it in 2 MB pages (of which `huge_memory` says why). Linux does so from
    6.16 on ext4, where it reads a file for the first time or wrote it in large pieces; None where it does not."""
    if sys.platform != "linux" or size < MAPPED_FROM:
        return None
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(22)  # MADV_POPULATE_READ, Linux 5.14: all pages now, so that they can be counted
        whole = np.frombuffer(memory, np.uint8)
        smaps = iter(Path("/proc/self/smaps").read_text().splitlines())
    except OSError:
        return None
    next(line for line in smaps if line.startswith(f"{whole.ctypes.data:x}-"))
    in_huge_pages = 1024 * int(next(line for line in smaps if line.startswith("FilePmdMapped")).split()[1])
    return whole if in_huge_pages >= HUGE_SHARE * size else None


def huge_memory(size: int) -> Array:
    """`size` bytes of memory in 2 MB pages, where there are any. Weights are read from end to end for every token:
    with pages of 4 KB the prefetcher stops at each one's end, and the cores wait for the TLB."""
    page = 2 << 20
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(memory, np.uint8)
    return data[-data.ctypes.data % page:][:size]


def read_huge(file: BinaryIO, size: int) -> Array:
    """The next `size` bytes of a file in such memory, read by several threads: clearing the pages takes as long as
    copying into them, and one core does a gigabyte a second."""
    data, start = huge_memory(size), file.tell()
    parts = [(at, min(at + (32 << 20), size)) for at in range(0, size, 32 << 20)]
    failed: list[BaseException] = []

    def read_parts() -> None:
        with contextlib.suppress(IndexError), open(file.name, "rb", buffering=0) as own:
            while True:
                at, end = parts.pop()
                own.seek(start + at)
                while at < end:
                    n = own.readinto(data[at:end].data)
                    if not n:
                        failed.append(ValueError("it grew shorter while it was read"))
                        return
                    at += n

    def guarded() -> None:
        try:
            read_parts()
        except OSError as error:
            failed.append(error)

    helpers = [threading.Thread(target=guarded) for _ in range(min(4, len(parts)) - 1)]
    for helper in helpers:
        helper.start()
    guarded()
    for helper in helpers:
        helper.join()
    if failed:
        raise failed[0]
    return data
