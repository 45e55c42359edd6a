"""GGUF files, out and in: what llama.cpp runs; as I2_S, what bitnet.cpp runs and ik_llama.cpp makes its IQ2_BN from.

    write_gguf(source, path, "auto")    # the smallest type that the shapes allow; says which, and why
    GGUFSource(path)

Ternary weights go out as exact trits, their scale as a separate F32 tensor `<name>.scale` which the graph multiplies
with afterwards (I2_S: in the matrix's own tail). Norms stay F32; the embedding, which is the head too, becomes F16.
Rows that are no whole number of a type's blocks become F16: exact as well, but 16 bits per weight.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import OF_TRITS, ModelConfig, from_saved
from core.files import UserError
from engine.packed_file import scale_of
from interop.files import Kind, check_free
from interop.gguf_file import BF16, F16, F32, I2_S, NAMES, Q8_0, Broken, GGUFFile, size_bytes, write_gguf_file
from interop.source import Figures, Source, Weight, bytes_bar, check_quantizers, check_vocab_size, weights_of
from interop.ternary import BLOCKS, Array, Unpacked, from_scaled, pack_i2_s, unpack_blocks, unpack_i2_s
from interop.tokenizer_json import from_gguf, to_gguf
from kernels.format import from_bf16

TYPES = ("auto", "tq1_0", "tq2_0", "q2_0", "i2_s", "f16")
ORDER = ("tq1_0", "q2_0")  # of auto: smallest first; where tq2_0 fits, tq1_0 does
WRITER = "BitGPT"
I2_S_ROW, I2_S_FILE_TYPE, F16_FILE_TYPE = 128, 40, 1
RELU2_ARCHS = ("bitnet-b1.58", "bitnet-25")
TERNARY = {block.number: kind for kind, block in BLOCKS.items()} | {I2_S: "i2_s"}
PARTS = {"attn_norm": "attn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.v_proj": "attn_v",
         "attn.sub_norm": "attn_sub_norm", "attn.o_proj": "attn_output", "mlp_norm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.sub_norm": "ffn_sub_norm",
         "mlp.down_proj": "ffn_down"}
WHOLE = {"wte": "token_embd", "norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """A weight's name in llama.cpp, with its ending .weight."""
    if not name.startswith("blocks."):
        return WHOLE[name.removesuffix(".weight")] + ".weight"
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{PARTS[part]}.weight"


# -- out ---------------------------------------------------------------------------------------------------------------

def check_graph(source: Source, type: str) -> None:
    """UserError, by name, for what the engines' bitnet graph has no place for."""
    config = source.config
    check_quantizers(source, "a GGUF file", OF_TRITS)
    hf = ", or export to a Hugging Face folder"
    for bad, setting, why, flag in (
            (not config.tie_embeddings, "an untied head", "takes the embedding for its head", f"--tie-embeddings{hf}"),
            (not config.sub_norm, "no sub-norms", "has norms before its output projections", f"--sub-norm{hf}"),
            (config.qk_norm, "norms on queries and keys (qk_norm)", "has none", "--no-qk-norm")):
        if bad:
            raise UserError(f"{source.path} has {setting}, but llama.cpp's bitnet graph {why}. Train with {flag}.")
    if config.act == "relu2" and (type not in ("auto", "i2_s") or source.twin == "gpt"):
        i2_s = "Take --type i2_s, which bitnet.cpp runs, or train" if source.twin == "bitgpt" else "Train"
        raise UserError(f"{source.path} has act relu2, which mainline llama.cpp's bitnet graph has not. {i2_s} with "
                        "--act silu.")
    if source.twin == "gpt" and type not in ("auto", "f16"):
        raise UserError(f"{source.path} is a run of gpt, full precision throughout: --type {type} would not hold its "
                        "weights. Take --type f16, or export the run of bitgpt.")


def choose_types(source: Source, type: str) -> tuple[dict[str, str], list[str]]:
    """The type of every linear, and what to say about the choice."""
    linears = [weight for weight in weights_of(source.config) if weight.linear]
    if source.twin == "gpt":
        return dict.fromkeys((w.name for w in linears), "f16"), ["full precision: the matrices become f16"]
    said = []
    if type == "auto" and source.config.act == "relu2":
        type, said = "i2_s", ["auto: i2_s, as act is relu2: for bitnet.cpp, and ik_llama.cpp's llama-quantize"]
    if type == "i2_s":
        for weight in linears:
            rows, columns = weight.shape
            if columns % I2_S_ROW or rows % 4:
                other = "Train with" if source.config.act == "relu2" else "Take --type q2_0 or f16, or train with"
                raise UserError(f"{source.path}: {weight.name} is {rows} x {columns}, but i2_s holds rows of a "
                                f"multiple of {I2_S_ROW} weights, four at a time. {other} other widths.")
        return dict.fromkeys((w.name for w in linears), "i2_s"), said
    wanted = ORDER if type == "auto" else (type,)
    types = {w.name: next((kind for kind in wanted if fits(kind, w)), "f16") for w in linears}
    if type in BLOCKS and type not in types.values():
        raise UserError(f"{source.path}: no row is a multiple of {BLOCKS[type].weights} weights, as --type {type} has "
                        "it. Take --type f16, or train with --n-embd and --n-ff that are multiples of it.")
    if type == "auto" or len(set(types.values())) > 1:
        for kind in dict.fromkeys((*wanted, "f16")):
            having = [w for w in linears if types[w.name] == kind]
            if having:
                said.append(f"{type}: {len(having)} of {len(linears)} matrices as {kind}, {why(kind, having, wanted)}")
    return types, said


def fits(kind: str, weight: Weight) -> bool:
    return kind not in BLOCKS or weight.shape[1] % BLOCKS[kind].weights == 0


def why(kind: str, having: list[Weight], wanted: tuple[str, ...]) -> str:
    rows = " and ".join(map(str, sorted({weight.shape[1] for weight in having})))
    if kind not in BLOCKS:
        return f"16 bits per weight: rows of {rows} weights are no whole blocks of {BLOCKS[wanted[-1]].weights}"
    block = BLOCKS[kind]
    bits = f"{8 * block.size / block.weights:g} bits per weight"
    return f"{bits}: the smallest for rows of {rows} weights, whole blocks of {block.weights}"


def gguf_metadata(source: Source, types: dict[str, str], name: str) -> dict[str, Any]:
    config = source.config
    arch = RELU2_ARCHS[0] if config.act == "relu2" else "bitnet"
    most = max(sorted(set(types.values())), key=list(types.values()).count)
    file_type = BLOCKS[most].file_type if most in BLOCKS else I2_S_FILE_TYPE if most == "i2_s" else F16_FILE_TYPE
    return {
        "general.architecture": arch, "general.name": name, "general.file_type": file_type,
        "general.quantized_by": WRITER,
        "general.quantization_version": 2, f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": config.block_size, f"{arch}.embedding_length": config.n_embd,
        f"{arch}.block_count": config.n_layer, f"{arch}.feed_forward_length": config.n_ff,
        f"{arch}.rope.dimension_count": config.head_dim, f"{arch}.rope.freq_base": float(config.rope_theta),
        f"{arch}.attention.head_count": config.n_head, f"{arch}.attention.head_count_kv": config.n_kv_head,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        **to_gguf(source.tokenizer, config.vocab_size)}


def half(weight: Tensor, name: str) -> Array:
    stored = weight.half()
    if not torch.isfinite(stored).all():
        raise UserError(f"{name} holds numbers that f16 cannot. Export to a Hugging Face folder instead.")
    return stored.numpy().reshape(-1).view(np.uint8)


def write_gguf(source: Source, path: Path, type: str = "auto", overwrite: bool = False, quiet: bool = False) -> None:
    check_free(path, overwrite, GGUF)
    check_graph(source, type)
    types, said = choose_types(source, type)
    tensors: list[tuple[str, tuple[int, ...], int]] = []
    weights: dict[str, Weight] = {}
    scales: dict[str, float] = {}
    numbers = {kind: block.number for kind, block in BLOCKS.items()} | {"f16": F16, "i2_s": I2_S}
    for weight in weights_of(source.config):
        name = gguf_name(weight.name)
        weights[name] = weight
        kind = numbers[types[weight.name]] if weight.linear else F32 if len(weight.shape) == 1 else F16
        tensors.append((name, weight.shape, kind))
        if weight.linear and source.twin == "bitgpt" and kind != I2_S:
            tensors.append((scale_of(name), (1,), F32))

    def make(name: str) -> Array:
        if name in scales:
            return np.array([scales[name]], "<f4").view(np.uint8)
        weight = weights[name]
        if not weight.linear or source.twin == "gpt":
            value = source.latent(weight)
            return half(value, weight.name) if value.dim() == 2 else value.numpy().view(np.uint8)
        w_trit, w_scale = source.ternary(weight)
        kind = types[weight.name]
        if kind == "i2_s":
            return pack_i2_s(w_trit, w_scale)
        scales[scale_of(name)] = w_scale
        return w_trit.astype("<f2").reshape(-1).view(np.uint8) if kind == "f16" else BLOCKS[kind].pack(w_trit).ravel()

    total = sum(size_bytes(shape, number) for _, shape, number in tensors)
    metadata = gguf_metadata(source, types, path.stem)
    if not quiet:
        for line in said:
            print(line, file=sys.stderr)
    try:
        with bytes_bar(path.name, total, quiet) as bar:
            write_gguf_file(path, metadata, tensors, make, bar.update)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Name another place.") from None


# -- in ----------------------------------------------------------------------------------------------------------------

def is_export(path: Path) -> bool:
    """Whether write_gguf made the file."""
    with contextlib.suppress(UserError, Broken, OSError):
        return bool(GGUFFile(path).metadata.get("general.quantized_by") == WRITER)
    return False


GGUF = Kind(is_export)


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"


class GGUFSource(Source):
    """Architectures bitnet, bitnet-b1.58, bitnet-25 and llama, with ternary linears or F16 and F32 ones."""

    def __init__(self, path: Path, block_size: int = 0) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.arch = self.file.metadata.get("general.architecture")
        self.config = model_config(self.file, path)
        self.figures = Figures()
        if block_size:
            self.config.block_size = min(block_size, self.config.block_size)
        self.tokenizer = from_gguf(self.file.metadata, self.config.vocab_size, path)
        check_vocab_size(self.config, self.tokenizer, path)
        listed = weights_of(self.config)
        known = {gguf_name(weight.name) for weight in listed}
        known |= {scale_of(gguf_name(weight.name)) for weight in listed if weight.linear}
        for name in self.file.tensors:
            if name not in known:
                raise UserError(f"{path} has a tensor {name}, which a BitGPT has no place for. Only llama.cpp's bitnet "
                                "graph is read, and llama's without biases.")
        self.twin = "bitgpt"
        linears = [weight for weight in listed if weight.linear]
        full = [weight.name for weight in linears if not self.is_ternary(weight)]
        if full:
            self.twin = "gpt"
            if len(full) < len(linears):
                raise UserError(f"{path}: {full[0]} is in full precision and others are ternary, but in a BitGPT all "
                                "linears are, or none.")

    def is_ternary(self, weight: Weight) -> bool:
        info = self.file.tensors.get(gguf_name(weight.name))
        return (info is not None and info.type in TERNARY) or isinstance(self.read(weight), Unpacked)

    def stored(self, weight: Weight) -> Tensor | Unpacked:
        name = gguf_name(weight.name)
        data = self.file.data(name)
        info = self.file.tensors[name]
        shape = info.shape
        if len(shape) != len(weight.shape):
            raise ValueError(f"it has {len(shape)} dimensions")
        if info.type in TERNARY:
            if not weight.linear:
                raise ValueError(f"it is {NAMES[info.type]}, but is no linear layer")
            matrix = (shape[0], shape[1])
            value = unpack_i2_s(data, matrix) if info.type == I2_S else unpack_blocks(TERNARY[info.type], data, matrix)
        else:
            plain = to_float(data, info.type).reshape(shape)
            found = from_scaled(plain) if weight.linear else None
            if found is None or self.twin == "gpt":
                return torch.from_numpy(self.in_our_order(plain, weight))
            value = found
        w_scale = value.w_scale
        if scale_of(name) in self.file.tensors:
            scale = self.file.tensors[scale_of(name)]
            if scale.type != F32 or scale.shape != (1,):
                raise ValueError(f"its scale is {NAMES[scale.type]} {scale.shape}, where b1.58 has one number a matrix")
            w_scale *= float(self.file.data(scale.name).view("<f4")[0])
        return Unpacked(self.in_our_order(value.w_trit, weight), w_scale)

    def in_our_order(self, matrix: Array, weight: Weight) -> Array:
        """llama files hold the rows of q and k for rotary embeddings of neighbours, ours for those of halves."""
        if self.arch == "llama" and weight.name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = matrix.reshape(-1, self.config.head_dim // 2, 2, matrix.shape[1])
            return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(matrix.shape)
        return matrix


def to_float(data: Array, type: int) -> Array:
    """fp32 of F32, F16, BF16 or Q8_0."""
    if type == Q8_0:
        blocks = data.reshape(-1, 34)
        return blocks[:, 2:].view(np.int8) * np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    if type == BF16:
        return from_bf16(data.view("<u2"))
    return data.view("<f4" if type == F32 else "<f2").astype(np.float32)


def model_config(file: GGUFFile, path: Path) -> ModelConfig:
    metadata = file.metadata
    arch = metadata.get("general.architecture")
    if arch not in ("bitnet", "llama", *RELU2_ARCHS):
        raise UserError(f"{path} is of the architecture {arch!r}. Known: bitnet, {', '.join(RELU2_ARCHS)} and llama.")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{path}: {arch}.{key} is {value!r}, where a number is expected. Restore it from a copy.")
        return value

    if metadata.get(f"{arch}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.tensors:
        raise UserError(f"{path} scales its rotary embeddings, and a BitGPT has only plain ones.")
    heads = get("attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    vocab_size = embedding.shape[0] if embedding is not None else 0
    content = dataclasses.asdict(ModelConfig()) | {
               "n_layer": get("block_count"), "n_head": heads, "n_kv_head": get("attention.head_count_kv", heads),
               "n_embd": get("embedding_length"), "n_ff": get("feed_forward_length"), "vocab_size": vocab_size,
               "block_size": get("context_length"), "act": "relu2" if arch in RELU2_ARCHS else "silu",
               "sub_norm": arch != "llama", "tie_embeddings": "output.weight" not in file.tensors,
               "rope_theta": get("rope.freq_base", 10000.0),
               "norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.7g}")}  # 1e-5 in fp32 is 9.99999975e-06
    if not vocab_size or content["n_layer"] > len(file.tensors):
        raise UserError(f"{path} says {content['n_layer']} layers and has {len(file.tensors)} tensors. It is damaged, "
                        "or has no weights.")
    config: ModelConfig = from_saved(ModelConfig, content, str(path)).resolved()
    if get("rope.dimension_count", config.head_dim) != config.head_dim:
        raise UserError(f"{path}: rotary embeddings over a part of each head, and a BitGPT's are over the whole.")
    return config
