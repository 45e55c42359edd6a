"""The packed bits: hand-written bytes, packer against unpacker, and files that lie."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core import safetensors_file
from core.config import ModelConfig
from core.files import UserError
from engine import packed_file
from kernels.format import (
    KINDS,
    from_bf16,
    pack,
    packed_shape,
    quantize_rows,
    to_bf16,
    unpack,
    valid_bytes,
)

Q = "blocks.0.attn.q_proj.weight"
CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=20).resolved()


def golden(kind, row, lane):
    """Packs one row into row 3 of a panel, and compares its lane of the first group."""
    w = np.zeros((4, len(row)), np.float32 if kind == "bf16" else np.int8)
    w[3] = row
    packed = pack(kind, w)
    assert packed.shape == packed_shape(kind, 4, len(row))
    lines = packed[0, 0].reshape(-1, 16, 4)
    assert lines[:, 3].tolist() == lane
    return packed


def test_golden_bytes_trit2():
    #      byte 0 holds columns 0, 4, 8, 12 from its low end; byte 1 columns 1, 5, 9, 13
    row = [-1, 0, 1, 1, 0, 0, 1, -1, 1, 0, 1, 0, 1, 0, 1, 1]
    packed = golden("trit2", row, [[0b10_10_01_00, 0b01_01_01_01, 0b10_10_10_10, 0b10_01_00_10]])
    assert (packed[0, 0].reshape(16, 4)[4:] == 0b01_01_01_01).all()  # rows that are not there are zeros


def test_golden_bytes_trit16():
    #      byte 0: columns 0, 4, 8, 12, 16 = -1 0 1 1 0 -> codes 0 1 2 2 1 -> f = 0 + 3 + 18 + 54 = 75 >= 64
    #      byte 1: columns 1, 5, 9, 13, 17 =  1 -1 0 0 1 -> codes 2 0 1 1 2 -> f = 2 + 0 + 9 + 27 = 38
    row = [-1, 1, 0, 1, 0, -1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1]
    golden("trit1.6", row, [[192 + 3 * (75 - 64) + 1, 64 * 2 + 38, 64 * 1 + 40, 192 + 3 * (80 - 64) + 2]])
    assert valid_bytes("trit1.6").tolist() == list(range(243))


def test_golden_bytes_q8():
    golden("q8", [-127, -1, 0, 127], [[1, 127, 128, 255]])


def test_golden_bytes_q6():
    #   columns 0, 4, 8, 12 of byte 0: -31 0 31 5 -> 1 32 63 37
    row = [-31, 0, 0, 0, 0, 0, 0, 0, 31, 0, 0, 0, 5, 0, 0, 0]
    zero = [0x00, 0x00, 0b10_10_10_10]  # 32 has nothing in its low four bits
    lines = [[0x01, *[zero[0]] * 3], [0x5F, *[zero[1]] * 3], [0b10_11_10_00, *[zero[2]] * 3]]
    golden("q6", row, lines)


def test_golden_bytes_bf16():
    golden("bf16", [1.0, -2.5], [[0x80, 0x3F, 0x20, 0xC0]])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), st.integers(1, 40), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_unpack_inverts_pack(kind, n, k, seed):
    rng = np.random.default_rng(seed)
    if kind == "bf16":
        w = from_bf16(rng.integers(0, 2**15, (n, k)).astype(np.uint16) % 0x7F80)
    else:
        w = rng.integers(-KINDS[kind].largest, KINDS[kind].largest + 1, (n, k)).astype(np.int8)
    packed = pack(kind, w)
    assert packed.dtype == np.uint8 and packed.shape == packed_shape(kind, n, k)
    assert np.array_equal(unpack(kind, packed, n, k), w)


@pytest.mark.parametrize("kind", ["trit2", "trit1.6"])
def test_bytes_that_are_no_codes_are_refused(kind):
    packed = pack(kind, np.ones((5, 7), np.int8))
    packed[0, 0, 1] = 255
    with pytest.raises(ValueError, match="no code"):
        unpack(kind, packed, 5, 7)
    with pytest.raises(ValueError, match="not"):
        unpack(kind, pack(kind, np.ones((5, 7), np.int8)), 17, 7)


def test_bf16_rounds_as_torch_does():
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    x[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0  # halves go to even
    assert np.array_equal(from_bf16(to_bf16(x)), torch.from_numpy(x).bfloat16().float().numpy())


@pytest.mark.parametrize(("kind", "worst"), [("q8", 0.5 / 127), ("q6", 0.5 / 31)])
def test_rows_are_quantized_within_half_a_step(kind, worst):
    w = np.random.default_rng(0).standard_normal((33, 50)).astype(np.float32)
    w[7] = 0
    codes, scale = quantize_rows(w, kind)
    found = unpack(kind, pack(kind, codes), 33, 50) * scale[:, None]
    assert (np.abs(found - w) <= np.abs(w).max(axis=1, keepdims=True) * worst * 1.001).all() and not found[7].any()


# ---------------------------------------------------------------------------------------------------- files
def make(entry):
    rng = np.random.default_rng(len(entry.name))
    if not entry.kind:
        return np.ones(entry.shape, np.float32), None
    w = rng.integers(-1, 2, entry.shape).astype(np.int8)
    scale = np.float32(0.5) if entry.kind.startswith("trit") else np.full(entry.shape[0], 0.01, np.float32)
    return pack(entry.kind, w), np.asarray(scale)


def written(path, weights="trit2"):
    packed_file.write(path, CONFIG, weights, "q8", {"source": "a test"}, make)
    return path


def valid(kind, packed):
    return bool(np.isin(packed, valid_bytes(kind)).all())


def read(path):
    return packed_file.read(path, CONFIG, valid)


@pytest.mark.parametrize("weights", ["trit2", "trit1.6"])
def test_a_packed_file_is_read_back(tmp_path, weights):
    path = written(tmp_path / "model.ternary.safetensors", weights)
    packed = read(path)
    assert (packed.weights, packed.head, packed.metadata["source"]) == (weights, "q8", "a test")
    for entry in packed_file.entries(CONFIG, weights, "q8"):
        assert np.array_equal(packed.tensors[entry.name], make(entry)[0])
        if entry.kind:  # lines of 64 bytes are cache lines
            assert packed.tensors[entry.name].ctypes.data % 64 == 0
    from safetensors.numpy import load_file  # what others read
    assert load_file(path).keys() == packed.tensors.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="files are mapped in large pages on Linux alone")
def test_a_mapped_file_is_the_file_and_goes_through_the_same_checks(tmp_path, monkeypatch):
    path = written(tmp_path / "model.ternary.safetensors")
    copied = read(path)
    monkeypatch.setattr(safetensors_file, "MAPPED_FROM", 0)
    monkeypatch.setattr(safetensors_file, "HUGE_SHARE", 0)
    mapped = read(path)
    assert mapped.metadata == copied.metadata and mapped.tensors.keys() == copied.tensors.keys()
    for name, tensor in mapped.tensors.items():
        assert np.array_equal(tensor, copied.tensors[name]) and not tensor.flags.writeable
        assert tensor.ctypes.data % 64 == 0 or tensor.dtype != np.uint8
    monkeypatch.setattr(safetensors_file, "HUGE_SHARE", 1.1)  # not in large pages: copied
    assert all(tensor.flags.writeable for tensor in read(path).tensors.values())
    monkeypatch.setattr(safetensors_file, "HUGE_SHARE", 0)
    whole = path.read_bytes()
    path.unlink()  # what is mapped stays, whatever happens to the name
    assert np.array_equal(mapped.tensors[Q], copied.tensors[Q])
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="damaged or cut short"):
        read(path)


def test_truncated_files_are_refused(tmp_path):
    whole = written(tmp_path / "model.ternary.safetensors").read_bytes()
    path = tmp_path / "model.cut.safetensors"
    for size in [*range(0, 12), 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged or cut short"):
            read(path)


def change(whole, alter):
    """The file with its header altered."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:8 + length])
    alter(header)
    text = json.dumps(header).encode()
    text += b" " * max(0, length - len(text))
    return len(text).to_bytes(8, "little") + text + whole[8 + length:]


@pytest.mark.parametrize("alter", [
    lambda h: h.pop(Q),
    lambda h: h.pop("norm.weight"),
    lambda h: h[Q].update(shape=[2, 2, 65]),
    lambda h: h[Q].update(shape=[4, 1, 64]),
    lambda h: h[Q].update(shape=[-2, -2, 64]),
    lambda h: h[Q].update(shape=[2.0, 2, 64]),
    lambda h: h[Q].update(shape=[2**40, 2**40, 64]),
    lambda h: h[Q].update(shape="big"),
    lambda h: h[Q].update(dtype="F32"),
    lambda h: h[Q].update(dtype="Q9"),
    lambda h: h[Q].update(data_offsets=[0, 2**62]),
    lambda h: h[Q].update(data_offsets=[2**62, 2**62 + 256]),
    lambda h: h[Q].update(data_offsets=[256, 0]),
    lambda h: h[Q].update(data_offsets=[-256, 0]),
    lambda h: h[Q].update(data_offsets=[0]),
    lambda h: h[Q].update(data_offsets=h["blocks.0.attn.k_proj.weight"]["data_offsets"]),
    lambda h: h[Q].update(dtype="I8"),
    lambda h: h[Q].pop("shape"),
    lambda h: h.update({Q: []}),
    lambda h: h["__metadata__"].update(weights="trit3"),
    lambda h: h["__metadata__"].update(format="another"),
    lambda h: h["__metadata__"].update(head=6),
    lambda h: h.pop("__metadata__"),
])
def test_impossible_headers_are_refused(tmp_path, alter):
    path = tmp_path / "model.ternary.safetensors"
    path.write_bytes(change(written(path).read_bytes(), alter))
    with pytest.raises(UserError, match="Remove it"):
        read(path)


def test_numbers_that_lie_across_their_alignment_are_refused(tmp_path):
    path = written(tmp_path / "model.ternary.safetensors")
    whole = path.read_bytes()

    def shift(header):
        last = max((h for name, h in header.items() if name != "__metadata__"), key=lambda h: h["data_offsets"])
        last["data_offsets"] = [at + 1 for at in last["data_offsets"]]
    path.write_bytes(change(whole, shift) + b"\0")
    with pytest.raises(UserError, match="not aligned"):
        read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "model.ternary.safetensors"
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not a file"):
        read(path)


def test_impossible_codes_and_scales_are_refused(tmp_path):
    path = written(tmp_path / "model.ternary.safetensors")
    whole = path.read_bytes()
    header = json.loads(whole[8:8 + int.from_bytes(whole[:8], "little")])
    data = 8 + int.from_bytes(whole[:8], "little")
    for name, bad, problem in ((Q, b"\xff", "no ternary codes"),
                               ("norm.weight", np.float32("nan").tobytes(), "not finite"),
                               (packed_file.scale_of(Q), np.float32("inf").tobytes(), "not finite")):
        at = data + header[name]["data_offsets"][0]
        path.write_bytes(whole[:at] + bad + whole[at + len(bad):])
        with pytest.raises(UserError, match=problem):
            read(path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_damage_is_refused_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "model.damaged.safetensors"
    whole = bytearray(written(path).read_bytes())
    length = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        packed = read(path)
    except UserError:
        return
    for tensor in packed.tensors.values():
        tensor.sum()  # every byte can be read


def test_other_peoples_files_are_refused(tmp_path):
    path = tmp_path / "model.ternary.safetensors"
    with pytest.raises(UserError, match="is missing"):
        read(path)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="cut short"):
        read(path)
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(UserError, match="cut short"):
        read(path)


def test_rows_too_wide_for_the_kernels_are_refused(tmp_path: Path) -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=2, n_ff=65540, block_size=4, vocab_size=3).resolved()
    path = tmp_path / "model.ternary.safetensors"

    def zeros(entry: packed_file.Entry) -> tuple[np.ndarray, np.ndarray | None]:
        dtype, shape = packed_file.stored(entry)[entry.name]
        scale = np.ones(() if entry.kind == "trit2" else entry.shape[0], np.float32)
        return np.zeros(shape, safetensors_file.DTYPES[dtype]), scale if entry.kind else None

    packed_file.write(path, config, "trit2", "q8", {}, zeros)
    with pytest.raises(UserError, match="more than the kernels' 65536"):
        packed_file.read(path, config, lambda kind, packed: True)
