"""The container: GGUF files, read without trusting them and written one tensor at a time. What is in them: gguf.py.

    "GGUF", version 3, tensors, pairs                                   (little-endian throughout)
    pairs times: key, type, value                                       (a text is its length and its UTF-8)
    tensors times: name, dimensions, their sizes (fastest first), type, offset from the start of the data
    padding to 32 bytes, then the tensors, each padded to 32
"""

import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.files import UserError, atomic_file
from interop.ternary import BLOCKS, Array

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
F32, F16, Q8_0, BF16, I2_S = 0, 1, 8, 30, 36
# type -> weights in a block, bytes of a block; I2_S has a tail besides
SIZES = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), BF16: (1, 2), I2_S: (4, 1)}
SIZES |= {block.number: (block.weights, block.size) for block in BLOCKS.values()}
NAMES = {F32: "F32", F16: "F16", Q8_0: "Q8_0", BF16: "BF16", I2_S: "I2_S"}
NAMES |= {block.number: name.upper() for name, block in BLOCKS.items()}
LARGEST = 2**48  # weights of one tensor: far above any, and products of a few stay far from where sizes could wrap


class Broken(ValueError):
    """A file that is not what it says."""


class TensorInfo(NamedTuple):
    """shape: rows first, as numpy has it. offset: from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def size_bytes(shape: tuple[int, ...], type: int) -> int:
    """Bytes of a tensor. Broken for an unknown type, or rows that are no whole number of blocks."""
    if type not in SIZES:
        raise Broken(f"type {type} is not known; known are {', '.join(NAMES.values())}")
    weights, block = SIZES[type]
    count = 1
    for n in shape:
        count *= n
        if count > LARGEST:
            raise Broken("more weights than any file holds")
    if shape and shape[-1] % weights or not shape:
        raise Broken(f"rows of {shape[-1] if shape else 0} weights in blocks of {weights}")
    return count // weights * block + (32 if type == I2_S else 0)


# -- reading -----------------------------------------------------------------------------------------------------------

class Cursor:
    """Reads forward; past the end is Broken."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise Broken(f"it ends within what it says it holds (byte {len(self.data)})")
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, format: str) -> Any:
        return struct.unpack("<" + format, self.take(struct.calcsize("<" + format)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, type: int) -> Any:
        if type == STRING:
            return self.text()
        if type in FORMATS:
            return self.number(FORMATS[type])
        if type != ARRAY:
            raise Broken(f"a value of the unknown type {type}")
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            if count > (len(self.data) - self.at) // 8:
                raise Broken(f"a list of {count} texts")
            return [self.text() for _ in range(count)]
        if inner not in FORMATS:
            raise Broken(f"a list of the unknown type {inner}")
        width = struct.calcsize("<" + FORMATS[inner])
        if count > (len(self.data) - self.at) // width:
            raise Broken(f"a list of {count} numbers")
        return [value for value, in struct.iter_unpack("<" + FORMATS[inner], self.take(count * width))]


class GGUFFile:
    """An opened file: `metadata` key -> value, `tensors` name -> TensorInfo; `data(name)` are its bytes. UserError
    where the file is damaged; every tensor is known to lie inside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size < 24:
                    raise Broken("it is too short")
                self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.read_header(Cursor(self.mapped))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}). Name a GGUF file.") from None
        except ValueError as error:
            raise UserError(f"{path} is no GGUF file that can be read: {error}. Restore it from a copy.") from None

    def read_header(self, cursor: Cursor) -> None:
        if cursor.take(4) != MAGIC:
            raise Broken("it does not begin with GGUF")
        version = cursor.number("I")
        if version not in VERSIONS:
            raise Broken(f"version {version}, of which 2 and 3 (little-endian) are known")
        tensors, pairs = cursor.number("Q"), cursor.number("Q")
        for _ in range(pairs):
            key = cursor.text()
            if key in self.metadata:
                raise Broken(f"{key} is there twice")
            self.metadata[key] = cursor.value(cursor.number("I"))
        for _ in range(tensors):
            name, dimensions = cursor.text(), cursor.number("I")
            if name in self.tensors or not 1 <= dimensions <= 4:
                raise Broken(f"{name} is there twice, or has {dimensions} dimensions")
            shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
            self.tensors[name] = TensorInfo(name, shape, cursor.number("I"), cursor.number("Q"))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment % 8:
            raise Broken(f"an alignment of {alignment!r}")
        self.start = -(-cursor.at // alignment) * alignment
        for name, shape, type, offset in self.tensors.values():
            try:
                end = self.start + offset + size_bytes(shape, type)
            except Broken as error:
                raise Broken(f"{name} cannot be read, {error}") from None
            if offset % alignment or end > len(self.mapped):
                raise Broken(f"{name} lies outside the file, or between its marks")

    def data(self, name: str) -> Array:
        """The bytes of a tensor, uint8; a view of the file. ValueError where there is none."""
        if name not in self.tensors:
            raise ValueError(f"there is no {name}")
        info = self.tensors[name]
        return np.frombuffer(self.mapped, np.uint8, size_bytes(info.shape, info.type), self.start + info.offset)


# -- writing -----------------------------------------------------------------------------------------------------------

def text_bytes(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def value_bytes(value: Any) -> bytes:
    """Type and value: bool, int as uint32, float as float32, str, or a list of str or of int (as int32)."""
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return struct.pack("<IIQ", ARRAY, INT32, len(value)) + struct.pack(f"<{len(value)}i", *value)
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(text_bytes, value))
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text_bytes(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    return struct.pack("<If", FLOAT32, value) if isinstance(value, float) else struct.pack("<II", UINT32, value)


def write_gguf_file(path: Path, metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], int]],
                    make: Callable[[str], Array], written: Callable[[int], Any]) -> None:
    """tensors: (name, shape, type), in the order of the file. make(name) -> its bytes, uint8, one tensor at a time."""
    head = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))
    for key, value in metadata.items():
        head += text_bytes(key) + value_bytes(value)
    infos, offset = [], 0
    for name, shape, type in tensors:
        infos.append(text_bytes(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], type, offset))
        offset += -(-size_bytes(shape, type) // ALIGNMENT) * ALIGNMENT
    head += b"".join(infos)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for name, shape, type in tensors:
            data = make(name)
            assert data.dtype == np.uint8 and data.size == size_bytes(shape, type), name
            file.write(np.ascontiguousarray(data).data)
            file.write(bytes(-data.size % ALIGNMENT))
            written(data.size)
