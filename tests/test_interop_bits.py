"""The bits of other programs' ternary formats, against their own packers or against one written from the definition."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # transformers compiles its quantizers as it is imported

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.bitnet import pack_weights

from bitgpt.bitlinear import quantize_weight
from interop.ternary import (
    BLOCKS,
    from_scaled,
    latents,
    pack_i2_s,
    pack_rows,
    unpack_blocks,
    unpack_i2_s,
    unpack_rows,
)


def trits(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(np.int8)


def test_rows_as_transformers_packs_them():
    w_trit = trits(24, 7)
    packed = pack_rows(w_trit)
    assert np.array_equal(packed, pack_weights(torch.from_numpy(w_trit).float()).numpy())
    assert np.array_equal(unpack_rows(packed), w_trit)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_blocks_as_the_gguf_package_packs_them(kind):
    w_trit = trits(6, 768)
    type = gguf.GGMLQuantizationType(BLOCKS[kind].number)
    packed = BLOCKS[kind].pack(w_trit)
    assert np.array_equal(packed.reshape(6, -1), gguf.quants.quantize(w_trit.astype(np.float32), type))
    assert np.array_equal(gguf.quants.dequantize(packed.reshape(6, -1), type), w_trit)
    assert np.array_equal(unpack_blocks(kind, packed.ravel(), (6, 768)).w_trit, w_trit)
    assert gguf.GGML_QUANT_SIZES[type] == (BLOCKS[kind].weights, BLOCKS[kind].size)


def test_q2_0_bit_by_bit():
    """block_q2_0: fp16 d, then 2 bits per weight from the low end of each byte, 0 for -1."""
    w_trit = trits(3, 128)
    want = b""
    for block in w_trit.reshape(-1, 64):
        want += struct.pack("<e", 1.0)
        for four in block.reshape(16, 4):
            want += bytes([sum((int(trit) + 1) << 2 * i for i, trit in enumerate(four))])
    packed = BLOCKS["q2_0"].pack(w_trit)
    assert packed.tobytes() == want and packed.shape == (6, 18)
    assert np.array_equal(unpack_blocks("q2_0", packed.ravel(), (3, 128)).w_trit, w_trit)


def test_i2_s_byte_by_byte():
    """bitnet.cpp on x86: of 128 weights, byte m has those at m, m + 32, m + 64, m + 96 from its high end; behind all
    bytes the scale, in 32 bytes."""
    w_trit = trits(4, 256)
    flat, want = w_trit.ravel(), bytearray(4 * 256 // 4)
    for j, trit in enumerate(flat):
        want[j // 128 * 32 + j % 32] |= (int(trit) + 1) << 6 - 2 * (j % 128 // 32)
    want += struct.pack("<f", 0.37) + bytes(28)
    packed = pack_i2_s(w_trit, 0.37)
    assert packed.tobytes() == bytes(want)
    back = unpack_i2_s(packed, (4, 256))
    assert np.array_equal(back.w_trit, w_trit) and np.float32(back.w_scale) == np.float32(0.37)


def test_known_bytes():
    """A row of +1, 0, -1, +1, 0, -1, ...: the bytes, worked out by hand from the definitions."""
    row = np.resize(np.array([1, 0, -1], np.int8), 256)[None]
    # q2_0: codes 2 1 0 2 | 1 0 2 1 | 0 2 1 0 -> 0b10000110, 0b01100001, 0b00011000
    assert BLOCKS["q2_0"].pack(row)[0, :5].tobytes() == b"\x00\x3c\x86\x61\x18"
    # tq2_0: byte 0 has weights 0, 32, 64, 96 -> codes 2 0 1 2 -> 0b10010010
    assert BLOCKS["tq2_0"].pack(row)[0, 0] == 0b10010010
    # tq1_0: byte 0 has weights 0, 32, 64, 96, 128 -> codes 2 0 1 2 0 -> 177 of 243 -> ceil(177 * 256 / 243) = 187
    assert BLOCKS["tq1_0"].pack(row)[0, 0] == 187
    # i2_s: byte 0 has weights 0, 32, 64, 96, the first on top -> 0b10000110
    assert pack_i2_s(row, 1.0)[0] == 0b10000110


def test_codes_that_are_no_trits_and_scales_that_differ_are_refused():
    with pytest.raises(ValueError, match="no trits"):
        unpack_rows(np.full((2, 3), 0xFF, np.uint8))
    for kind in ("tq2_0", "q2_0"):
        block = BLOCKS[kind].pack(np.zeros((2, 256), np.int8)).copy()
        block[0, 5] = 0xFF
        with pytest.raises(ValueError, match="no trits"):
            unpack_blocks(kind, block.ravel(), (2, 256))
    blocks = BLOCKS["tq1_0"].pack(trits(2, 256)).copy()
    blocks[1, -2:] = np.array([2.0], "<f2").view(np.uint8)
    with pytest.raises(ValueError, match="different scales"):
        unpack_blocks("tq1_0", blocks.ravel(), (2, 256))


def test_a_block_of_zeros_may_say_scale_zero():
    w_trit = np.concatenate([np.zeros((1, 256), np.int8), trits(1, 256)])
    packed = gguf.quants.quantize(w_trit * np.float32(0.5), gguf.GGMLQuantizationType.TQ2_0)
    back = unpack_blocks("tq2_0", packed.ravel(), (2, 256))
    assert np.array_equal(back.w_trit, w_trit) and back.w_scale == 0.5


def test_a_matrix_that_is_trits_times_a_scale_is_seen():
    w_trit = trits(5, 9)
    found = from_scaled(w_trit * np.float32(0.125))
    assert found is not None and np.array_equal(found.w_trit, w_trit) and found.w_scale == 0.125
    assert from_scaled(np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)) is None


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 300), st.floats(1e-3, 3), st.integers(0, 99))
def test_latents_quantize_to_the_same_trits_and_the_very_scale(rows, columns, width, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * width
    w_trit, w_scale = quantize_weight(weight)
    again, scale = quantize_weight(torch.from_numpy(latents(w_trit.numpy(), float(w_scale))))
    assert torch.equal(again, w_trit) and scale == w_scale


def test_latents_of_large_matrices_too():
    w_trit, w_scale = quantize_weight(torch.randn(2560, 6912, generator=torch.Generator().manual_seed(1)) * 0.01)
    again, scale = quantize_weight(torch.from_numpy(latents(w_trit.numpy(), float(w_scale))))
    assert torch.equal(again, w_trit) and scale == w_scale


def test_a_scale_that_b158_cannot_have_is_refused():
    for scale in (float("nan"), float("inf"), 0.0, -1.0, 1e-6):
        with pytest.raises(ValueError, match="scale"):
            latents(trits(2, 3), scale)
