"""model.ternary.safetensors, model.bf16.safetensors: a run's weights as the kernels read them, no bit to be moved.
numpy only, no torch.

A safetensors file (any reader lists it) whose tensors have the names of the checkpoint's weights: matrices as uint8 in
the layout of kernels/format.py, each with a `.scale` beside it (fp32; one a matrix of trits, one a row of q8 and q6),
norms in fp32. Data begins at a multiple of 64 bytes and matrices come first, so every line of the kernels is a cache
line. The header's metadata says what is packed how ("weights", "head"), of which twin, of which checkpoint ("source").
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.config import ModelConfig
from core.files import UserError, atomic_file
from core.safetensors_file import DTYPES, header, open_safetensors
from kernels.format import Array, packed_shape

FORMAT = "bitgpt packed 1"
WIDEST = 65536  # columns: int32 holds the largest sum of so many products with 8-bit codes
HEADS, WEIGHTS = ("q8", "q6", "bf16"), ("trit2", "trit1.6", "bf16")


class Entry(NamedTuple):
    """A tensor of the model. kind: of format.KINDS, "" for a norm; shape: (n, k) or (n,)."""

    name: str
    kind: str
    shape: tuple[int, ...]


def entries(config: ModelConfig, weights: str, head: str) -> list[Entry]:
    """All tensors of a model: matrices in the order of their use, then norms."""
    C, F, V, kv = config.n_embd, config.n_ff, config.vocab_size, config.n_kv_head * config.head_dim
    matrices, norms = [Entry("wte.weight", head, (V, C))], [Entry("norm.weight", "", (C,))]
    for i in range(config.n_layer):
        b = f"blocks.{i}."
        matrices += [Entry(f"{b}{name}.weight", weights, shape) for name, shape in (
            ("attn.q_proj", (C, C)), ("attn.k_proj", (kv, C)), ("attn.v_proj", (kv, C)), ("attn.o_proj", (C, C)),
            ("mlp.gate_proj", (F, C)), ("mlp.up_proj", (F, C)), ("mlp.down_proj", (C, F)))]
        norms += [Entry(f"{b}{name}.weight", "", shape) for name, shape, wanted in (
            ("attn_norm", (C,), True), ("attn.sub_norm", (C,), config.sub_norm), ("mlp_norm", (C,), True),
            ("mlp.sub_norm", (F,), config.sub_norm), ("attn.q_norm", (config.head_dim,), config.qk_norm),
            ("attn.k_norm", (config.head_dim,), config.qk_norm)) if wanted]
    if not config.tie_embeddings:
        matrices.append(Entry("lm_head.weight", head, (V, C)))
    return matrices + norms


def stored(entry: Entry, per_row: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of the file that hold an entry: name -> (dtype, shape)."""
    if not entry.kind:
        return {entry.name: ("F32", entry.shape)}
    n, k = entry.shape
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {entry.name: ("U8", packed_shape(entry.kind, n, k))}
    if entry.kind != "bf16":
        trits = entry.kind.startswith("trit")
        tensors[scale_of(entry.name)] = ("F32", () if trits and not per_row else (n,))
    return tensors


def scale_of(name: str) -> str:
    return name.removesuffix("weight") + "scale"


def write(path: Path, config: ModelConfig, weights: str, head: str, metadata: dict[str, str],
          make: Callable[[Entry], tuple[Array, Array | None]]) -> None:
    """Packs and writes one tensor after another. make(entry) -> (packed or norm, scale or None)."""
    listed = entries(config, weights, head)
    metadata = {"format": FORMAT, "weights": weights, "head": head, **metadata}
    tensors = {e.name: stored(e, per_row=config.scale == "row") for e in listed}
    layout: list[tuple[str, str, tuple[int, ...]]] = [(name, *parts[name]) for name, parts in tensors.items()]
    layout += [(name, *spec) for whole, parts in tensors.items() for name, spec in parts.items() if name != whole]
    with atomic_file(path) as temporary, open(temporary, "wb", buffering=32 << 20) as file:  # large: see mapped_huge
        file.write(header(layout, metadata, align=64))
        scales = []
        for entry in listed:
            array, scale = make(entry)
            assert array.shape == stored(entry)[entry.name][1], entry.name
            file.write(np.ascontiguousarray(array).data)
            if scale is not None:
                scales.append(np.ascontiguousarray(scale, np.float32))
        for scale in scales:
            file.write(scale.tobytes())


class Packed(NamedTuple):
    """An opened packed file: weights and head are kinds of format.py; tensors as in the file."""

    config: ModelConfig
    weights: str
    head: str
    tensors: dict[str, Array]
    metadata: dict[str, str]


def read(path: Path, config: ModelConfig, valid: Callable[[str, Array], bool]) -> Packed:
    """Reads a packed file and checks it against the run's shape, and its bytes with `valid(kind, packed)`. UserError
    where anything is not as it must be."""
    tensors, metadata = open_safetensors(path, into_memory=True)
    remedy = "Remove it, and it is made again from the checkpoint."
    weights, head = metadata.get("weights", ""), metadata.get("head", "")
    if metadata.get("format") != FORMAT or weights not in WEIGHTS or head not in HEADS:
        raise UserError(f"{path} is no packed file of this version ({metadata.get('format')!r}). {remedy}")
    if max(config.n_embd, config.n_ff) > WIDEST:
        raise UserError(f"{path}: rows of {max(config.n_embd, config.n_ff)} weights are more than the kernels' "
                        f"{WIDEST}. Use --kernel torch.")
    for entry in entries(config, weights, head):
        for name, (dtype, shape) in stored(entry).items():
            found = tensors.get(name)
            shapes = [shape, (entry.shape[0],)] if name.endswith(".scale") else [shape]
            if found is None or found.dtype != DTYPES[dtype] or found.shape not in shapes or not found.flags.aligned:
                there = "missing" if found is None else \
                    f"{found.dtype} {found.shape}{'' if found.flags.aligned else ', not aligned'}"
                raise UserError(f"{path}: {name} is {there}, but the model's settings make it "
                                f"{np.dtype(DTYPES[dtype])} {shape}. {remedy}")
            if dtype == "F32" and not np.isfinite(found).all():
                raise UserError(f"{path}: {name} holds a number that is not finite. {remedy}")
        if entry.kind.startswith("trit") and not valid(entry.kind, tensors[entry.name]):
            raise UserError(f"{path}: {entry.name} holds bytes that are no ternary codes. {remedy}")
    return Packed(config, weights, head, tensors, metadata)


