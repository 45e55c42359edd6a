"""The CPU engine: a run's packed weights through the C kernels, a whole decode step in one call. numpy only, no torch.

    engine = CPUEngine.from_run("runs/bitgpt")            # packs the run on first use (that imports torch, once)
    logits = engine.forward(tokens)                       # (B, T) ids -> (B, V)

Neighbours: packing.py and packed_file.py (the file), cpu.c (the arithmetic), kernels/ (the bits, the compiler).
"""

import ctypes
import functools
import os
from pathlib import Path

import numpy as np

from core.config import ModelConfig
from core.files import UserError
from engine import packed_file
from engine.evaluation import cross_entropy
from engine.packed_file import Packed, entries, scale_of
from engine.packing import pack_run
from engine.sampling import Engine, exclusive
from kernels.build import ISAS, NoKernel, compile_kernels
from kernels.format import KINDS, Array

SOURCE = Path(__file__).with_name("cpu.c")
CHUNK = 512  # of model.h
KV_CACHES = ("fp32", "bf16")


class Shape(ctypes.Structure):
    """struct shape of cpu.c"""

    _fields_ = [(name, ctypes.c_int) for name in (
        "n_layer", "n_head", "n_kv_head", "n_embd", "n_ff", "block_size", "vocab_size", "relu2",
        "tied", "ternary", "kv_bf16", "threads")]


@functools.cache
def library(isa: str = "auto", sanitize: bool = False) -> ctypes.CDLL:
    """The loaded kernels, with the types of their functions. NoKernel where they cannot be compiled or loaded."""
    if isa not in ISAS:
        raise UserError(f"instruction set {isa!r} is not known. Choose from: {', '.join(ISAS)}.")
    try:
        lib = ctypes.CDLL(str(compile_kernels(SOURCE, isa, sanitize)))
    except OSError as error:
        raise NoKernel(f"the compiled kernels do not load ({error})") from None
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    for name, result, arguments in (
            ("isa", ctypes.c_char_p, []),
            ("create", pointer, [ctypes.POINTER(Shape), real, pointer, pointer]),
            ("destroy", None, [pointer]),
            ("matrix", integer, [pointer] + [integer] * 5 + [pointer, pointer, integer]),
            ("norm", integer, [pointer, integer, integer, integer, pointer]),
            ("reset", integer, [pointer, integer]),
            ("forward", integer, [pointer, pointer, integer, integer, pointer]),
            ("threads", integer, [pointer]),
            ("count_invalid", ctypes.c_int64, [integer, pointer, ctypes.c_int64]),
            ("product", integer, [integer] * 3 + [pointer] * 2 + [integer] + [pointer] * 4),
            ("bandwidth", ctypes.c_double, [pointer, ctypes.c_int64, integer, integer, integer])):
        function = getattr(lib, f"bitgpt_{name}")
        function.restype, function.argtypes = result, arguments
    assert ctypes.c_int.in_dll(lib, "bitgpt_shape_bytes").value == ctypes.sizeof(Shape)
    return lib


def default_threads() -> int:
    """The physical cores that this process may run on: two threads of one core share its vector units."""
    try:
        mine = os.sched_getaffinity(0)
        siblings = Path("/sys/devices/system/cpu")
        return len({(siblings / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in mine})
    except (OSError, AttributeError):
        return os.cpu_count() or 1


def address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


def all_codes(lib: ctypes.CDLL, kind: str, packed: Array) -> bool:
    """Whether every byte of a packed matrix is a code of its kind."""
    return not lib.bitgpt_count_invalid(KINDS[kind].number, address(packed), packed.size)


def rotary_tables(config: ModelConfig) -> tuple[Array, Array]:
    """cos and sin (block_size, D / 2) in fp32, as gpt/model.py computes them. arXiv 2104.09864"""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.power(np.float32(config.rope_theta), exponents, dtype=np.float32)
    angles = np.outer(np.arange(config.block_size, dtype=np.float32), frequencies)
    return np.cos(angles), np.sin(angles)


class CPUEngine(Engine):
    """Packed weights in memory, a KV cache, and the threads that run them. Raises NoKernel where C cannot run.

    threads: 0 takes the physical cores. isa: auto, or a name of ISAS to run less than the CPU can. kv_cache: what
    keys and values are kept as; fp32 is exact, bf16 half as much memory to read.
    """

    kernel = "cpu"

    def __init__(self, packed: Packed, threads: int = 0, isa: str = "auto", sanitize: bool = False,
                 kv_cache: str = "fp32") -> None:
        super().__init__()
        self.handle: int | None = None
        assert kv_cache in KV_CACHES
        self.config, self.packed = packed.config, packed
        self.library = library(isa, sanitize)
        self.isa = self.library.bitgpt_isa().decode()
        c = self.config
        threads = threads or default_threads()
        shape = Shape(c.n_layer, c.n_head, c.n_kv_head, c.n_embd, c.n_ff, c.block_size, c.vocab_size, c.act == "relu2",
                      c.tie_embeddings, packed.weights != "bf16", kv_cache == "bf16", threads)
        self.tables = rotary_tables(c)
        self.handle = self.library.bitgpt_create(ctypes.byref(shape), c.norm_eps, *map(address, self.tables))
        if not self.handle:
            raise MemoryError("no memory for the CPU engine")
        numbers = {"wte": 0, "lm_head": 1, "attn.q_proj": 2, "attn.k_proj": 3, "attn.v_proj": 4, "attn.o_proj": 5,
                   "mlp.gate_proj": 6, "mlp.up_proj": 7, "mlp.down_proj": 8}
        norms = {"norm": 0, "attn_norm": 1, "attn.sub_norm": 2, "mlp_norm": 3, "mlp.sub_norm": 4, "attn.q_norm": 5,
                 "attn.k_norm": 6}
        for entry in entries(c, packed.weights, packed.head):
            name, layer = entry.name.removesuffix(".weight"), 0
            if name.startswith("blocks."):
                _, number, name = name.split(".", 2)
                layer = int(number)
            array = packed.tensors[entry.name]
            if entry.kind:
                scale = packed.tensors.get(scale_of(entry.name))
                failed = self.library.bitgpt_matrix(
                    self.handle, numbers[name], layer, KINDS[entry.kind].number, *entry.shape, address(array),
                    address(scale), 0 if scale is None else scale.size)
            else:
                array = np.ascontiguousarray(array)
                failed = self.library.bitgpt_norm(self.handle, norms[name], layer, *entry.shape, address(array))
            if failed:
                raise MemoryError("no memory for the CPU engine")
        self.reset(1)

    @classmethod
    def from_run(cls, run: str | Path, checkpoint: str = "best", threads: int = 0, weights: str = "trit2",
                 head: str = "q8", isa: str = "auto", kv_cache: str = "fp32") -> "CPUEngine":
        """The engine of a run folder, packed first where it is not or where the checkpoint has changed since."""
        lib = library(isa)  # first: without a compiler there is no use in packing

        path, config = pack_run(Path(run), checkpoint, weights, head)
        return cls(packed_file.read(path, config, lambda kind, packed: all_codes(lib, kind, packed)), threads, isa,
                   kv_cache=kv_cache)

    @property
    def threads(self) -> int:
        return self.library.bitgpt_threads(self.handle)

    @exclusive
    def reset(self, batch: int) -> None:
        if self.forked and self.threads > 1:
            raise UserError("this engine was loaded by another process, and its threads do not live on in a fork. Load "
                            "it after the fork, or with threads=1.")
        self.batch, self.length = 0, 0
        if self.library.bitgpt_reset(self.handle, batch):
            raise UserError(f"no memory for the KV cache of {batch} sequences of {self.config.block_size} tokens. "
                            "Generate fewer samples at once (--num-samples), or take --kv-cache bf16.")
        self.batch = batch

    def forward(self, tokens: Array) -> Array:
        return self.logits(tokens)[:, 0]

    def nats(self, tokens: Array, targets: Array) -> Array:
        most = max(1, CHUNK // len(tokens))
        cuts = [slice(at, at + most) for at in range(0, tokens.shape[1], most)]
        return np.concatenate([cross_entropy(self.logits(tokens[:, cut], True), targets[:, cut]) for cut in cuts],
                              axis=1)

    @exclusive
    def logits(self, tokens: Array, all_logits: bool = False) -> Array:
        """tokens (B, T), behind what the cache holds -> logits (B, 1, V) of the last, or all (B, T, V), of up to CHUNK
        tokens."""
        tokens = np.ascontiguousarray(tokens, np.int64)  # C tells which are none
        B, T = tokens.shape
        assert not all_logits or T == 1 or B * T <= CHUNK
        assert self.batch == B and T >= 1 and self.length + T <= self.config.block_size
        assert not self.forked or self.threads == 1
        logits = np.empty((B, T if all_logits else 1, self.config.vocab_size), np.float32)
        failed = self.library.bitgpt_forward(self.handle, address(tokens), T, all_logits, address(logits))
        if failed == -2:
            raise ValueError(f"a token is not in the vocabulary of {self.config.vocab_size}")
        if failed:
            raise UserError(f"no memory for {B} x {T} tokens. Take fewer at once.")
        self.length += T
        return logits

    def __del__(self) -> None:
        if getattr(self, "handle", None) and not self.forked:  # there are no threads to end
            self.library.bitgpt_destroy(self.handle)
            self.handle = None
