"""Ternary weights, bit by bit, as other programs store them; and latent weights that quantize to given trits and scale.

Every packer takes w_trit int8 (N, K) in {-1, 0, 1} and codes a trit as trit + 1; its unpacker is the inverse and
raises ValueError on a code that is no trit. Blocks run along a row.

    rows    transformers' BitLinear, (N / 4, K): bits 2 i, 2 i + 1 of byte (r, k) hold row r + i N / 4, column k
    TQ1_0   256 trits in 54 bytes: 32 bytes of 5 trits (byte m: trits m, m + 32, ...), 16 of 5 (160 + m, + 16, ...),
            4 of 4 (240 + m, + 4, ...), then fp16 d. A byte is ceil(256 / 243 * base-3 number), first trit first
    TQ2_0   256 in 66: byte 32 j + m holds trits 128 j + m, + 32, + 64, + 96, the first in bits 0-1; then fp16 d
    Q2_0     64 in 18: fp16 d, then byte m holds trits 4 m ... 4 m + 3, the first in bits 0-1
    I2_S    128 in 32: byte m holds trits m, m + 32, m + 64, m + 96, the first in bits 6-7; behind the last block of
            the matrix its fp32 scale and 28 bytes of padding

d multiplies its block; here it is always 1, and the scale of the matrix is kept beside it in fp32. The layouts are
those of ggml-quants.c (mainline llama.cpp) and, for I2_S on x86, of ggml-bitnet-mad.cpp (bitnet.cpp).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels.format import Array

POWERS = np.array([81, 27, 9, 3, 1], np.uint8)  # base 3, first trit first


class Unpacked(NamedTuple):
    """w_trit int8 (N, K) and the one scale they share."""

    w_trit: Array
    w_scale: float


def trits_of(codes: Array) -> Array:
    if codes.size and codes.max() > 2:
        raise ValueError("it holds codes that are no trits")
    return codes.astype(np.int8) - 1


# -- transformers ------------------------------------------------------------------------------------------------------

def pack_rows(w_trit: Array) -> Array:
    """(N, K) -> (N / 4, K) uint8; N must be a multiple of 4."""
    code = (w_trit + 1).astype(np.uint8).reshape(4, -1, w_trit.shape[1])
    return code[0] | code[1] << 2 | code[2] << 4 | code[3] << 6


def unpack_rows(packed: Array) -> Array:
    """(N / 4, K) uint8 -> (N, K) int8."""
    return trits_of(np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)]))


# -- GGUF --------------------------------------------------------------------------------------------------------------

def halves(count: int) -> Array:
    """fp16 1.0, `count` times, as bytes (count, 2)."""
    return np.ones((count, 1), "<f2").view(np.uint8)


def pack_tq1_0(w_trit: Array) -> Array:
    code = (w_trit + 1).astype(np.uint8).reshape(-1, 256)
    parts = [(code[:, :160].reshape(-1, 5, 32) * POWERS[:, None]).sum(1, dtype=np.uint16),
             (code[:, 160:240].reshape(-1, 5, 16) * POWERS[:, None]).sum(1, dtype=np.uint16),
             (code[:, 240:].reshape(-1, 4, 4) * POWERS[:4, None]).sum(1, dtype=np.uint16)]
    number = np.concatenate(parts, axis=1)
    return np.concatenate([((number * 256 + 242) // 243).astype(np.uint8), halves(len(code))], axis=1)


def unpack_tq1_0(blocks: Array) -> tuple[Array, Array]:
    def digits(part: Array, count: int) -> Array:
        shifted = part[:, None, :] * POWERS[::-1][:count, None]          # modulo 256: what is left behind the point
        return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(part), -1)

    codes = np.concatenate([digits(blocks[:, :32], 5), digits(blocks[:, 32:48], 5), digits(blocks[:, 48:52], 4)], 1)
    return codes, blocks[:, 52:54]


def pack_tq2_0(w_trit: Array) -> Array:
    code = (w_trit + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = code[:, :, 0] | code[:, :, 1] << 2 | code[:, :, 2] << 4 | code[:, :, 3] << 6
    return np.concatenate([packed.reshape(-1, 64), halves(len(code))], axis=1)


def unpack_tq2_0(blocks: Array) -> tuple[Array, Array]:
    packed = blocks[:, :64].reshape(-1, 2, 1, 32)
    return (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(-1, 256), blocks[:, 64:66]


def pack_q2_0(w_trit: Array) -> Array:
    code = (w_trit + 1).astype(np.uint8).reshape(-1, 16, 4)
    packed = code[..., 0] | code[..., 1] << 2 | code[..., 2] << 4 | code[..., 3] << 6
    return np.concatenate([halves(len(code)), packed], axis=1)


def unpack_q2_0(blocks: Array) -> tuple[Array, Array]:
    return (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1, 64), blocks[:, :2]


def pack_i2_s(w_trit: Array, w_scale: float) -> Array:
    """The whole matrix with its scale, (N K / 4 + 32,) uint8."""
    code = (w_trit + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = code[:, 0] << 6 | code[:, 1] << 4 | code[:, 2] << 2 | code[:, 3]
    tail = np.zeros(32, np.uint8)
    tail[:4] = np.array([w_scale], "<f4").view(np.uint8)
    return np.concatenate([packed.ravel(), tail])


def unpack_i2_s(data: Array, shape: tuple[int, int]) -> Unpacked:
    packed = data[:-32].reshape(-1, 1, 32)
    codes = packed >> np.array([6, 4, 2, 0], np.uint8)[:, None] & 3
    return Unpacked(trits_of(codes.reshape(shape)), float(data[-32:-28].view("<f4")[0]))


class Block(NamedTuple):
    """A ternary GGUF type with a d a block. number: of enum ggml_type."""

    number: int
    weights: int  # in a block
    size: int     # bytes of a block
    file_type: int  # of a file that is mostly made of it: enum llama_ftype
    pack: Callable[[Array], Array]
    unpack: Callable[[Array], tuple[Array, Array]]


BLOCKS = {"tq1_0": Block(34, 256, 54, 36, pack_tq1_0, unpack_tq1_0),
          "tq2_0": Block(35, 256, 66, 37, pack_tq2_0, unpack_tq2_0),
          "q2_0": Block(42, 64, 18, 41, pack_q2_0, unpack_q2_0)}


def unpack_blocks(kind: str, data: Array, shape: tuple[int, int]) -> Unpacked:
    """A matrix of a type in BLOCKS. ValueError where its blocks have more than one scale."""
    codes, d = BLOCKS[kind].unpack(data.reshape(-1, BLOCKS[kind].size))
    w_trit = trits_of(codes)
    scales = np.ascontiguousarray(d).view("<f2")[:, 0][w_trit.any(axis=1)]  # a block of zeros may say d = 0
    if scales.size and not (scales == scales[0]).all():
        raise ValueError("its blocks have different scales")
    return Unpacked(w_trit.reshape(shape), float(scales[0]) if scales.size else 1.0)


def from_scaled(weight: Array) -> Unpacked | None:
    """fp32 (N, K) that is trits times one scale already, as those; None for any other matrix."""
    scale = np.abs(weight).max(initial=0) or np.float32(1)
    w_trit = np.sign(weight).astype(np.int8)
    return Unpacked(w_trit, float(scale)) if np.array_equal(w_trit * scale, weight) else None


# -- latent weights ----------------------------------------------------------------------------------------------------

SMALLEST_SCALE = 1e-5  # bitgpt/quantizers.py's EPS


def check_scale(w_scale: float) -> float:
    if not (math.isfinite(w_scale) and np.float32(SMALLEST_SCALE) <= w_scale):
        raise ValueError(f"its scale is {w_scale:g}, where b1.58 has a mean of at least {SMALLEST_SCALE:g}")
    return w_scale


def latents(w_trit: Array, w_scale: float) -> Array:
    """fp32 (N, K) with these trits whose mean|W| is this scale, so that quantizing it gives both back.

    trit * scale would not do: its mean is the scale times the share of non-zeros. Non-zeros get scale / share, in
    whole units of 2^-23 of the sum: then every partial sum is exact in fp32, in whatever order a machine adds. Above
    some millions of non-zeros there are not enough units; there all get nearly one value, searched for until this
    machine's mean is the scale. (Another machine's may differ by a rounding.)
    """
    count = int(np.count_nonzero(w_trit))
    if not count:
        return w_trit.astype(np.float32)  # any scale times nothing
    scale, size = np.float32(check_scale(w_scale)), np.float32(w_trit.size)
    total = scale * size
    for near in (total, np.nextafter(total, np.float32(0)), np.nextafter(total, np.float32(np.inf))):
        if near / size == scale:
            total = near
            break
    unit = math.ldexp(1.0, math.frexp(float(total))[1] - 24)
    units = round(float(total) / unit)                                   # 2^23 <= units < 2^24
    each, left = divmod(units, count)
    if each < 4:
        return nearly_even(w_trit, np.float32(float(scale) * w_trit.size / count), scale)
    latent = w_trit.astype(np.float32) * np.float32(each * unit)
    places = np.flatnonzero(w_trit)[:left]
    flat = latent.reshape(-1)
    flat[places] += w_trit.reshape(-1)[places] * np.float32(unit)
    return latent


def nearly_even(w_trit: Array, value: Any, scale: Any) -> Array:
    """w_trit times about `value`, with the mean|W| that is `scale`: the weights up to some place get the next fp32
    number above the rest's, and the place is found by bisection over eight such steps."""
    steps = [value]
    for _ in range(4):
        steps = [np.nextafter(steps[0], np.float32(0)), *steps, np.nextafter(steps[-1], np.float32(np.inf))]
    low, high = 0, 8 * w_trit.size
    flat = w_trit.reshape(-1)
    latent = np.empty(w_trit.size, np.float32)
    for _ in range(40):
        step, place = divmod((low + high) // 2, w_trit.size)
        np.multiply(flat[:place], steps[step + 1], out=latent[:place])
        np.multiply(flat[place:], steps[step], out=latent[place:])
        mean = float(torch.from_numpy(latent).abs().mean())
        if mean == scale or high - low <= 1:
            break
        low, high = (low, (low + high) // 2) if mean > scale else ((low + high) // 2, high)
    return latent.reshape(w_trit.shape)
