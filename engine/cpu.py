"""The CPU engine: a run's packed weights through the C kernels, a whole decode step in one call. numpy only, no torch.

    engine = CPUEngine.from_run("runs/bitgpt")            # packs the run on first use (that imports torch, once)
    logits = engine.forward(tokens)                       # (B, T) ids -> (B, V)

Neighbours: format.py (the bits), packed_file.py (the file), build.py (the compiler), cpu.c (the arithmetic).
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

import numpy as np

from core.config import ModelConfig
from core.files import UserError
from core.run_folder import checksum, read_config, weights_file
from engine import packed_file
from engine.build import Shape, library
from engine.evaluation import cross_entropy
from engine.format import KINDS, Array, pack, quantize_rows
from engine.packed_file import Entry, Packed, entries, open_safetensors, scale_of
from engine.sampling import Engine

MAX_THREADS = 64  # of pool.h
CHUNK = 512       # of model.h
KV_CACHES = ("fp32", "bf16")
FILE_NAMES = {"bitgpt": "model.ternary.safetensors", "gpt": "model.bf16.safetensors"}


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

    threads: 0 takes the physical cores. isa: auto, or a name of build.ISAS to run less than the CPU can. kv_cache: what
    keys and values are kept as; fp32 is exact, bf16 half as much memory to read.
    """

    kernel = "cpu"

    def __init__(self, packed: Packed, threads: int = 0, isa: str = "auto", sanitize: bool = False,
                 kv_cache: str = "fp32") -> None:
        self.handle: int | None = None
        assert kv_cache in KV_CACHES
        self.config, self.packed = packed.config, packed
        self.library = library(isa, sanitize)
        self.isa = self.library.bitgpt_isa().decode()
        c = self.config
        threads = min(threads or default_threads(), MAX_THREADS)
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

    def reset(self, batch: int) -> None:
        self.batch, self.length = 0, 0
        if self.library.bitgpt_reset(self.handle, batch):
            raise UserError(f"no memory for the KV cache of {batch} sequences of {self.config.block_size} tokens. "
                            "Generate fewer samples at once.")
        self.batch = batch

    def forward(self, tokens: Array) -> Array:
        return self.logits(tokens)[:, 0]

    def nats(self, tokens: Array, targets: Array) -> Array:
        most = max(1, CHUNK // len(tokens))
        cuts = [slice(at, at + most) for at in range(0, tokens.shape[1], most)]
        return np.concatenate([cross_entropy(self.logits(tokens[:, cut], True), targets[:, cut]) for cut in cuts],
                              axis=1)

    def logits(self, tokens: Array, every: bool = False) -> Array:
        """tokens (B, T), behind what the cache holds -> logits (B, 1, V) of the last; (B, T, V) of `every` one of up to
        CHUNK tokens."""
        tokens = np.ascontiguousarray(tokens, np.int32)
        B, T = tokens.shape
        assert self.batch == B and T >= 1 and self.length + T <= self.config.block_size
        logits = np.empty((B, T if every else 1, self.config.vocab_size), np.float32)
        failed = self.library.bitgpt_forward(self.handle, address(tokens), T, every, address(logits))
        if failed == -2:
            raise ValueError(f"a token is not in the vocabulary of {self.config.vocab_size}")
        if failed:
            raise UserError(f"no memory for {B} x {T} tokens. Take fewer at once.")
        self.length += T
        return logits

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.bitgpt_destroy(self.handle)
            self.handle = None


def unpackable(twin: str, config: ModelConfig) -> str:
    """The setting of a run that keeps it from being packed, "" where none does."""
    return config.unfit(twin, norm=("sub",), weight_quant=("absmean", "absmedian", "sign"), activation_quant=("int8",))


def pack_run(run: Path, checkpoint: str = "best", weights: str = "trit2", head: str = "q8") -> tuple[Path, ModelConfig]:
    """Makes the run's packed file, tensor by tensor, unless it is there and of the same checkpoint. Returns its path
    and the model's shape. weights is for the ternary twin; the matrices of the other one are packed as bf16."""
    twin, config, _ = read_config(run)
    unfit = unpackable(twin, config)
    if unfit:
        raise UserError(f"{run} was trained with {unfit}, which the packed kernels do not know. Take --kernel torch.")
    weights = weights if twin == "bitgpt" else "bf16"
    path, source = run / FILE_NAMES[twin], weights_file(run, checkpoint)
    identity = ""
    if source.exists():
        stat = source.stat()
        identity = f"{source.name} {stat.st_size} {stat.st_mtime_ns}"
    if path.exists():
        _, metadata = open_safetensors(path)
        same = metadata.get("format") == packed_file.FORMAT and (metadata.get("weights"), metadata.get("head")) == (
            weights, head)
        if not identity or (same and metadata.get("source") == identity):
            return path, config
    latent, metadata = open_safetensors(source)
    print(f"packing {source} ({weights}, head {head}) ...", file=sys.stderr, flush=True)

    if metadata.get("crc32"):  # convert.py writes without
        found = checksum(((name, f"torch.{w.dtype}", w.shape, np.ascontiguousarray(w).data)
                          for name, w in sorted(latent.items())), metadata.get("state", "{}"))
        if found != metadata["crc32"]:
            raise UserError(f"{source} is damaged (its checksum is another). Restore it from a copy, or train the run "
                            "again.")

    def make(entry: Entry) -> tuple[Array, Array | None]:
        w = latent.get(entry.name)
        if w is None or w.shape != entry.shape or w.dtype != np.float32:
            raise UserError(f"{source}: {entry.name} is {'missing' if w is None else w.shape}, but the settings make "
                            f"it {entry.shape} in fp32. Use the architecture it was trained with.")
        return pack_tensor(entry, w, config.weight_quant, config.scale == "row")

    try:
        packed_file.write(path, config, weights, head, {"twin": twin, "source": identity}, make)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(f"{path} cannot be written: {error.strerror}. Make {run} writable, copy it, or take --kernel "
                        "torch, which packs nothing.") from None
    return path, config


def pack_tensor(entry: Entry, w: Array, weight_quant: str = "absmean",
                per_row: bool = False) -> tuple[Array, Array | None]:
    """(packed, scale) of one latent fp32 tensor; a norm as it is."""
    if not entry.kind:
        return w, None
    if entry.kind == "bf16":
        return pack("bf16", w), None
    if entry.kind in ("q8", "q6"):
        codes, scale = quantize_rows(w, entry.kind)
        return pack(entry.kind, codes), scale
    import torch  # mean|W| sums in torch's order, so that the scale is the very number the model was trained with

    from bitgpt.quantizers import quantize_weight
    w_trit, w_scale = quantize_weight(torch.from_numpy(np.array(w)), weight_quant, per_row)
    return pack(entry.kind, w_trit.numpy()), w_scale.numpy().reshape(w_scale.shape[:1])
