"""The packed weights, bit by bit: one spec, one packer, one unpacker. The C kernels (integers.h) read the same bytes.

A matrix (N rows = outputs, K columns = inputs) is cut into panels of 16 rows, a panel into groups of columns, and a
group is one line of 64 bytes (q6: three) in which the lane r of 4 bytes belongs to row r:

    packed  # (ceil(N / 16), ceil(K / columns), bytes of a group) uint8
            row  |    0    |    1    | ... |   15    |
            byte | 0 1 2 3 | 4 5 6 7 | ... | 60 .. 63|     byte j of a lane: columns 4 p + j, p the plane

    kind     columns  a byte of row r, j = 0..3, as bits 7..0                                       bits per weight
    trit2       16    p3 p3 p2 p2 p1 p1 p0 p0    pi: trit of column 4 i + j, plus 1                         2
    trit1.6     20    base 3: f = p0 + 3 p1 + 9 p2 + 27 p3 (0..80), and p4;                                 1.6
                      f < 64: byte = 64 p4 + f, so p4 p4 f f f f f f;   f >= 64: byte = 192 + 3 (f - 64) + p4
    q8           4    w + 128, w = round(weight / scale), -127..127, one scale a row                        8
    q6          16    line 0: l1 l1 l1 l1 l0 l0 l0 l0    line 1: l3 .. l2 ..    line 2: h3 h3 h2 h2 h1 h1 h0 h0
                      16 hi + li = w + 32 of column 4 i + j, w = round(weight / scale), -31..31             6
    bf16         2    two bfloat16, little-endian: columns 0 and 1                                         16

Rows beyond N and columns beyond K hold zeros (as codes: trit 0 is 1, and so on). A weight is (code - offset) * scale;
trits have one fp32 scale a matrix or one a row. Why not plain base 3 in 1.6 bits: bits 6-7 are the fifth trit unless
both are set, and one 64-byte table lookup by bits 0-5 (`vpermb`) gives the other four: 4 operations for 320 weights.
"""

from typing import Any, NamedTuple

import numpy as np

from core.safetensors_file import Array

ROWS = 16


class Kind(NamedTuple):
    number: int   # enum kind in integers.h
    columns: int  # a group holds
    size: int     # bytes of a group
    offset: int   # what codes are above their weights
    largest: int  # |weight|, in steps of the scale


KINDS = {"trit2": Kind(0, 16, 64, 1, 1), "trit1.6": Kind(1, 20, 64, 1, 1), "q8": Kind(2, 4, 64, 128, 127),
         "q6": Kind(3, 16, 192, 32, 31), "bf16": Kind(4, 2, 64, 0, 0)}


def packed_shape(kind: str, n: int, k: int) -> tuple[int, int, int]:
    """(panels, groups, bytes) of a matrix of n rows and k columns."""
    return -(-n // ROWS), -(-k // KINDS[kind].columns), KINDS[kind].size


def byte_of_trits() -> Array:
    """trit1.6: the byte (3, 3, 3, 3, 3) for codes [p4, p3, p2, p1, p0], each 0..2."""
    f, p4 = np.meshgrid(np.arange(81), np.arange(3))
    return np.where(f < 64, 64 * p4 + f, 192 + 3 * (f - 64) + p4).astype(np.uint8).reshape(3, 3, 3, 3, 3)


def trits_of_bytes(kind: str) -> Array:
    """(256, planes) int8: the trits of each byte, 2 where a byte is no code."""
    if kind == "trit1.6":
        trits = np.full((256, 5), 2, np.int8)
        trits[byte_of_trits().ravel()] = np.indices((3, 3, 3, 3, 3)).reshape(5, -1).T[:, ::-1] - 1
        return trits
    trits = (np.arange(256)[:, None] >> np.arange(0, 8, 2) & 3).astype(np.int8) - np.int8(1)
    trits[trits.max(axis=1) == 2] = 2
    return trits


def valid_bytes(kind: str) -> Array:
    """All bytes a packed matrix of trits can hold, ascending."""
    return np.flatnonzero(trits_of_bytes(kind)[:, 0] < 2).astype(np.uint8)


def q6_planes(a: Any, b: Any, c: Any) -> list[Any]:
    """The codes in a group's three lines: low halves of two planes a byte in a and b, high bits of all four in c."""
    return [a & 15 | (c & 3) << 4, a >> 4 | (c >> 2 & 3) << 4, b & 15 | (c >> 4 & 3) << 4, b >> 4 | (c >> 6) << 4]


def pack(kind: str, w: Array) -> Array:
    """w: (N, K) whole numbers within the kind's range (bf16: floats) -> packed (panels, groups, bytes) uint8."""
    n, k = w.shape
    columns, size, offset, largest = KINDS[kind][1:]
    panels, groups, _ = packed_shape(kind, n, k)
    codes = np.zeros((panels * ROWS, groups * columns), np.uint16 if kind == "bf16" else np.uint8)
    if kind == "bf16":
        codes[:n, :k] = to_bf16(w)
        lanes = codes.reshape(panels, ROWS, groups, columns).astype("<u2").view(np.uint8)
        return np.ascontiguousarray(lanes.transpose(0, 2, 1, 3)).reshape(panels, groups, size)
    assert n == 0 or k == 0 or np.abs(w).max() <= largest
    codes[:] = offset
    codes[:n, :k] += w.astype(np.int16).astype(np.uint8)  # modulo 256, which offset brings back into range
    p = codes.reshape(panels, ROWS, groups, columns // 4, 4).transpose(3, 0, 2, 1, 4)  # (plane, panel, group, row, j)
    if kind == "trit2":
        lines = [p[0] | p[1] << 2 | p[2] << 4 | p[3] << 6]
    elif kind == "trit1.6":
        lines = [byte_of_trits()[p[4], p[3], p[2], p[1], p[0]]]
    elif kind == "q8":
        lines = [p[0]]
    else:
        lines = [p[0] & 15 | p[1] << 4, p[2] & 15 | p[3] << 4,
                 p[0] >> 4 | p[1] >> 4 << 2 | p[2] >> 4 << 4 | p[3] >> 4 << 6]
    return np.stack([line.reshape(panels, groups, 64) for line in lines], axis=2).reshape(panels, groups, size)


def unpack(kind: str, packed: Array, n: int, k: int) -> Array:
    """The inverse of `pack`: (n, k) int8, for bf16 float32. ValueError on a byte that is no code."""
    columns, size, offset, _ = KINDS[kind][1:]
    panels, groups, _ = packed_shape(kind, n, k)
    if packed.shape != (panels, groups, size) or packed.dtype != np.uint8:
        raise ValueError(f"packed weights are {packed.shape}, not {(panels, groups, size)}")
    if kind == "bf16":
        lanes = np.ascontiguousarray(packed).view("<u2").reshape(panels, groups, ROWS, columns).transpose(0, 2, 1, 3)
        return from_bf16(lanes.reshape(panels * ROWS, groups * columns)[:n, :k])
    lines = packed.reshape(panels, groups, size // 64, ROWS, 4)
    if kind.startswith("trit"):
        w = trits_of_bytes(kind)[lines[:, :, 0]].swapaxes(3, 4)                        # (panel, group, row, plane, j)
        if (w == 2).any():
            raise ValueError("a byte of the packed weights is no code for trits")
    else:
        planes = [lines[:, :, 0]] if kind == "q8" else q6_planes(lines[:, :, 0], lines[:, :, 1], lines[:, :, 2])
        w = (np.stack(planes, axis=3).astype(np.int16) - offset).astype(np.int8)
    return np.ascontiguousarray(w.swapaxes(1, 2).reshape(panels * ROWS, groups * columns)[:n, :k])


def to_bf16(x: Array) -> Array:
    """fp32 -> bfloat16 as uint16, to the nearest, halves to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def from_bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


def quantize_rows(w: Array, kind: str) -> tuple[Array, Array]:
    """w fp32 (N, K) -> (whole numbers int8 (N, K), scale fp32 (N,)) for q8 and q6: absmax of each row."""
    scale = (np.abs(w).max(axis=1, initial=1e-12) / KINDS[kind].largest).astype(np.float32)
    return np.rint(w / scale[:, None]).astype(np.int8), scale
