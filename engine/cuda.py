"""The CUDA engine: a run's packed weights on the GPU, through the Triton kernels; a decode step is one CUDA graph.

    engine = CUDAEngine.from_run("runs/bitgpt")            # packs the run on first use
    logits = engine.forward(tokens)                        # (B, T) ids -> (B, V)
    for ids in engine.generate(prompt, num_samples=4): ... # sampled on the device, a step ahead of who reads them

Neighbours: packed_file.py (the file); in kernels/ launch.py (the kernels as functions), gpu_format.py (the bits on the
GPU), gpu.py (whether a machine can do this). Around the quantized layers all is fp32; keys and values are cached in
fp16.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from core.config import ModelConfig
from core.files import UserError
from core.run_folder import read_config
from core.runtime import say_once
from engine import packed_file
from engine.packed_file import Packed, scale_of
from engine.packing import pack_run
from engine.sampling import Engine, Sampler, check_finite, check_whole, exclusive
from gpt.model import rotary_tables
from kernels import gpu
from kernels.build import NoKernel
from kernels.format import Array, trits_of_bytes
from kernels.gpu_format import Matrix, in_turns, matrix, stacked
from kernels.launch import Heads, attend, embed, head, linear, rotate

AT_ONCE = 16384     # tokens in one pass: more are read in several, which bounds the memory that a long prompt takes
KEPT_GRAPHS = 8     # the latest: decode steps by how they are sampled, and prompts by length


class Layer(NamedTuple):
    """A block's weights. qkv: rows of q, k, v, one below the other; gate_up: rows in turns. Norms: fp32, or None."""

    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    attn_norm: Tensor
    sub_norm: Tensor | None
    mlp_norm: Tensor
    mlp_sub_norm: Tensor | None
    qk_norms: tuple[Tensor, Tensor] | None


def device_called(name: str) -> torch.device:
    """The GPU that `name` (auto, cuda, cuda:N) names. NoKernel, with the reason, where the kernels cannot run on it."""
    device = torch.device("cuda", gpu.require(name))
    if not torch.cuda.is_available():
        raise NoKernel(f"torch {torch.__version__} does not find the GPU (is the driver as new as its CUDA version?)")
    return device


@contextlib.contextmanager
def enough_memory(batch: int, length: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"no memory on the GPU for {batch} x {length} tokens. Take fewer at once.") from None


class Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Tensor


class Graphs:
    """Computations by name. The first run of each is an ordinary one, in which kernels are compiled and libraries set
    up; the second is captured as a CUDA graph, and from then on one launch replays all of it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.captures = device, device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None  # none runs beside another
        self.refused = ""                           # why nothing is captured any more
        self.seen: dict[object, Graph | None] = {}  # the latest last

    def run(self, key: object, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """compute(*inputs), which may be overwritten by the next run of the same key. What else compute reads has to
        stay where it is."""
        if not self.captures:
            return compute(*(x.to(self.device) for x in inputs))
        if key not in self.seen:
            if len(self.seen) == KEPT_GRAPHS:
                torch.cuda.synchronize(self.device)  # a graph that runs must not be destroyed
                del self.seen[next(iter(self.seen))]
            self.seen[key] = None
            return compute(*(x.to(self.device) for x in inputs))
        captured = self.seen.pop(key)
        if captured is None:
            own = tuple(x.to(self.device, copy=True) for x in inputs)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, self.pool, torch.cuda.Stream(self.device),
                                      capture_error_mode="thread_local"):  # other threads may allocate meanwhile
                    result = compute(*own)
            except RuntimeError as why:  # the last one: torch's allocator is not what it was after a failed capture
                torch.cuda.set_stream(torch.cuda.default_stream(self.device))  # which may leave its own
                self.captures, self.refused = False, str(why).splitlines()[0]
                say_once(f"note: no CUDA graphs: {self.refused}; going on without, which takes longer")
                return compute(*own)
            captured = Graph(graph, own, result)
        self.seen[key] = captured
        for to, x in zip(captured.inputs, inputs, strict=True):
            to.copy_(x)
        captured.graph.replay()
        return captured.result


class CUDAEngine(Engine):
    """Packed weights and KV cache on a GPU. Raises NoKernel where the kernels cannot run."""

    kernel = "triton"

    def __init__(self, packed: Packed, device: torch.device) -> None:
        super().__init__()
        c = self.config = packed.config
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where Triton launches and events are recorded
        self.heads = Heads(c.n_head, c.n_kv_head, c.head_dim, c.norm_eps)
        self.act = "relu2" if c.act == "relu2" else "silu"
        self.tables = rotary_tables(0, c.block_size, c.head_dim, c.rope_theta, device)
        shapes = {entry.name: entry for entry in packed_file.entries(c, packed.weights, packed.head)}

        def ternary(name: str) -> Matrix:
            entry = shapes[name + ".weight"]
            scale = packed.tensors.get(scale_of(entry.name))
            return matrix(entry.kind, self.on_device(packed.tensors[entry.name]),
                          None if scale is None else self.on_device(scale), entry.shape[0], entry.shape[1])

        def norm(name: str) -> Tensor | None:
            found = packed.tensors.get(name + ".weight")
            return None if found is None else self.on_device(found)

        def needed(name: str) -> Tensor:
            return self.on_device(packed.tensors[name + ".weight"])

        self.wte = ternary("wte")
        self.lm_head = self.wte if c.tie_embeddings else ternary("lm_head")
        self.norm = needed("norm")
        self.layers = []
        for i in range(c.n_layer):
            b = f"blocks.{i}."
            self.layers.append(Layer(
                stacked(*(ternary(f"{b}attn.{part}_proj") for part in "qkv")), ternary(b + "attn.o_proj"),
                in_turns(ternary(b + "mlp.gate_proj"), ternary(b + "mlp.up_proj")), ternary(b + "mlp.down_proj"),
                needed(b + "attn_norm"), norm(b + "attn.sub_norm"), needed(b + "mlp_norm"), norm(b + "mlp.sub_norm"),
                (needed(b + "attn.q_norm"), needed(b + "attn.k_norm")) if c.qk_norm else None))
        self.batch, self.cache = 0, torch.empty(0)  # (keys and values, n_layer, B, G, S, D)
        self.reset(1)

    @classmethod
    def from_run(cls, run: str | Path, checkpoint: str = "best", device: str = "auto", weights: str = "trit2",
                 head: str = "q8") -> "CUDAEngine":
        """The engine of a ternary run, packed first where it is not or where the checkpoint has changed since."""
        if read_config(Path(run)).twin != "bitgpt":
            raise NoKernel("it runs ternary models, and this is a full-precision run")
        place = device_called(device)
        return cls.from_file(*pack_run(Path(run), checkpoint, weights, head), place)

    @classmethod
    def from_file(cls, path: Path, config: ModelConfig, device: torch.device) -> "CUDAEngine":
        """The engine of a file that pack_run made."""
        return cls(packed_file.read(path, config, lambda kind, packed: valid_codes(kind, packed, device)), device)

    def peak_memory(self) -> int:
        """Bytes on the GPU that tensors have taken at most."""
        return torch.cuda.max_memory_allocated(self.device)

    def on_device(self, array: Array) -> Tensor:
        return shared(np.ascontiguousarray(array)).to(self.device)

    @exclusive
    def reset(self, batch: int) -> None:
        self.length = 0
        if batch == self.batch:
            return
        c = self.config
        shape = (c.n_layer, batch, c.n_kv_head, c.block_size, c.head_dim)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)     # a graph that runs must not be destroyed
        self.graphs = Graphs(self.device)           # those of another batch size are of no use
        self.batch, self.cache = 0, torch.empty(0)  # their memory first
        try:
            self.cache = torch.zeros((2, *shape), dtype=torch.float16, device=self.device)
        except torch.OutOfMemoryError:
            raise UserError(f"no memory on the GPU for the KV cache of {batch} sequences of {c.block_size} tokens. "
                            "Generate fewer samples at once (--num-samples).") from None
        self.batch = batch
        self.ids = torch.zeros(batch, dtype=torch.int64, device=self.device)     # the tokens of the next decode step,
        self.at = torch.zeros(1, dtype=torch.int32, device=self.device)          # their position,
        self.draw = torch.zeros(batch, dtype=torch.float64, device=self.device)  # and the sampler's random numbers;
        self.finite = torch.zeros(batch, dtype=torch.float32, device=self.device)  # finite where all logits were

    @exclusive
    def forward(self, tokens: Array) -> Array:
        B, T = tokens.shape
        assert self.batch == B and T >= 1 and self.length + T <= self.config.block_size
        assert tokens.min() >= 0 and tokens.max() < self.config.vocab_size
        logits: Array = self.feed(tokens).cpu().numpy()
        return logits

    @exclusive
    @torch.inference_mode()
    def nats(self, tokens: Array, targets: Array) -> Array:
        x, y = (torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device) for array in (tokens, targets))
        start, self.length = self.length, self.length + x.shape[1]
        with enough_memory(*x.shape):
            logits = self.prefill(x, start, all_logits=True)                                       # (B T, V)
            found: Array = F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape).cpu().numpy()
        return found

    @torch.inference_mode()
    def feed(self, tokens: Array) -> Tensor:
        """Logits (B, V) of the last of tokens (B, T), on the device; overwritten by the next call."""
        B, T = tokens.shape
        fresh = torch.from_numpy(np.ascontiguousarray(tokens, np.int64))
        if T == 1 and self.length:
            self.ids.copy_(fresh[:, 0])
            return self.step(("step",), self.decode)
        most = max(1, AT_ONCE // B)
        with enough_memory(B, T):
            for at in range(0, T, most):
                logits = self.read(fresh[:, at:at + most])
        return logits

    def step(self, key: tuple[object, ...], compute: Callable[[], Tensor]) -> Tensor:
        """A decode step, at the position that the cache has reached."""
        self.at.fill_(self.length)
        with enough_memory(self.batch, 1):
            result = self.graphs.run(key, compute)
        self.length += 1
        return result

    def read(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of the last of tokens (B, T), which follow what the cache holds."""
        T, start = tokens.shape[1], self.length
        self.length += T
        if start:  # hardly twice the same
            return self.prefill(tokens.to(self.device), start)
        return self.graphs.run(T, lambda tokens: self.prefill(tokens, 0), tokens)

    def blocks(self, x: Tensor, attention: Callable[[Layer, Tensor, Tensor], Tensor]) -> None:
        """The transformer's blocks on x (M, C), in place. attention(layer, its cache, qkv) -> (M, C)."""
        eps = self.config.norm_eps
        for i, layer in enumerate(self.layers):
            y = attention(layer, self.cache[:, i], linear(x, layer.qkv, "scaled", layer.attn_norm, eps))
            linear(y, layer.o, "residual", layer.sub_norm, eps, into=x)
            y = linear(x, layer.gate_up, self.act, layer.mlp_norm, eps)
            linear(y, layer.down, "residual", layer.mlp_sub_norm, eps, into=x)

    def decode(self) -> Tensor:
        """Logits (B, V) behind self.ids at self.at. Nothing in here depends on a number that the host knows."""
        x = embed(self.ids, self.wte)                                                     # (B, C)
        self.blocks(x, lambda layer, cache, qkv: attend(qkv, self.heads, layer.qk_norms, self.tables, self.at,
                                                        cache[0], cache[1]))
        return head(x, self.lm_head, self.norm, self.config.norm_eps)

    def prefill(self, tokens: Tensor, start: int, all_logits: bool = False) -> Tensor:
        """Logits of tokens (B, T), which begin at position `start`: (B, V) of the last, or all, (B * T, V)."""
        B, T = tokens.shape
        mask = None
        if start and T > 1:  # a chunk behind a prefix: is_causal would align it to the first key
            mask = causal_lower_right(T, start + T)  # flash attention knows it, other masks take all scores' memory

        def attention(layer: Layer, cache: Tensor, qkv: Tensor) -> Tensor:
            q = rotate(qkv, self.heads, layer.qk_norms, self.tables, start, cache[0], cache[1])
            y = F.scaled_dot_product_attention(
                q, cache[0, :, :, :start + T], cache[1, :, :, :start + T], attn_mask=mask,
                is_causal=mask is None and T > 1, enable_gqa=self.heads.g != self.heads.h)
            return y.transpose(1, 2).reshape(B * T, -1)                                   # (M, C) fp16

        x = embed(tokens.reshape(-1), self.wte)                                           # (M, C)
        self.blocks(x, attention)
        return head(x if all_logits else x.view(B, T, -1)[:, -1].contiguous(), self.lm_head, self.norm,
                    self.config.norm_eps)

    @torch.inference_mode()
    def generate(self, prompt: list[int], num_samples: int = 1, max_new_tokens: int = 100, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, seed: int = 1337) -> Iterator[Array]:
        """As Engine.generate, with the same random numbers. The next step is under way while the caller has the ids of
        this one."""
        sampler = Sampler(temperature, top_k, top_p, seed)
        check_whole("max_new_tokens", max_new_tokens, 0)
        size, temperature = self.config.block_size, sampler.temperature

        def choose(logits: Tensor) -> Tensor:
            ids, finite = sample(logits, self.draw, temperature, top_k, top_p)
            self.finite.copy_(finite)
            return self.ids.copy_(ids)

        def copies() -> list[Callable[[], Array]]:
            return [to_host(self.ids), to_host(self.finite)]

        def redraw() -> None:
            if temperature:
                self.draw.copy_(torch.from_numpy(sampler.random.random(num_samples)), non_blocking=True)

        with self.lock:
            context = self.begin(prompt, num_samples)                                     # (B, T)
            uses = self.uses
            logits = self.feed(context)
            redraw()
            choose(logits)
            chosen = copies()
        for left in range(max_new_tokens - 1, -1, -1):
            with self.lock:
                self.go_on(uses)
                full = self.length == size
                if left and not full:
                    redraw()
                    self.step((temperature, top_k, top_p), lambda: choose(self.decode()))
                    following = copies()
            new, finite = (copy() for copy in chosen)
            check_finite(finite)
            yield new
            context = np.concatenate((context, new[:, None]), axis=1)[:, -size:]
            if left and full:  # the window slides by halves
                with self.lock:
                    self.go_on(uses)
                    self.reset(num_samples)
                    uses = self.uses
                    logits = self.feed(context[:, -max(1, size // 2):])
                    redraw()
                    choose(logits)
                    following = copies()
            chosen = following if left else chosen


def sample(logits: Tensor, draw: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """What sampling.Sampler does, on the device: logits (B, V), random numbers (B,) in 0..1 -> ids (B,), and of each a
    number that is finite where its logits are. But of logits that equal the top_k-th only as many are taken as make
    top_k."""
    if temperature == 0:
        largest, ids = logits.max(dim=-1)
        return ids, largest
    order = None
    if 0 < top_k < logits.shape[1]:  # the likeliest, in the order of their ids
        order = logits.topk(top_k).indices.sort(dim=-1).values
        logits = logits.gather(1, order)
    likelihood = ((logits - logits.amax(dim=-1, keepdim=True)).double() / temperature).exp()  # (B, n)
    if top_p < 1:  # the likeliest tokens up to the one that reaches it and all that equal it: arXiv 1904.09751
        falling = likelihood.sort(dim=-1, descending=True).values
        cumulative = falling.cumsum(dim=-1)
        inside = cumulative - falling < top_p * cumulative[:, -1:]
        least = falling.gather(1, (inside.sum(dim=-1, keepdim=True) - 1).clamp_(min=0))  # none: NaN
        likelihood = likelihood * (likelihood >= least)
    cumulative = likelihood.cumsum(dim=-1)
    place = (cumulative <= draw[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    place.clamp_(max=cumulative.shape[1] - 1)
    return (place if order is None else order.gather(1, place))[:, 0], cumulative[:, -1]


def to_host(x: Tensor) -> Callable[[], Array]:
    """Starts to copy x to the host; call the result to wait for it. Nothing else waits."""
    if x.device.type != "cuda":
        return x.clone().numpy
    copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)  # whatever the default device is
    copy.copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Array:
        done.synchronize()
        return copy.numpy()

    return wait


def valid_codes(kind: str, packed: Array, device: torch.device) -> bool:
    """Whether every byte of a packed ternary matrix is a code."""
    table = torch.from_numpy(trits_of_bytes(kind).max(axis=1) <= 1).to(device)
    return bool(table[shared(packed).to(device).int()].all())


def shared(array: Array) -> Tensor:
    """The same memory as a tensor, to be read: that of a mapped file cannot be written, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)

