"""The training step of both twins on a CPU, in few passes over memory: a block is one call of fused.c forward and one
backward, and so is the head with its loss. Products are in bf16 or fp32, and the ternary twin's forward in int8.

    x = block(x, cos, sin, shape, norms, linears)        # norms, quantization, products, attention, activation, dropout
    nats = loss(x, norm, head, targets)
    muon(weights, grads, momenta, dtype, ...)            # the optimizer's step of all matrices

gpt/model.py has the same in plain torch, which runs everywhere else (GPUs, no compiler, odd widths) and is what these
are tested against. Shapes as there; M = B * T tokens, K inputs and N outputs of a product.
"""

import contextlib
import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.config import ModelConfig
from kernels.build import NoKernel, compile_kernels

SOURCE = Path(__file__).with_name("fused.c")
ACTS = {"silu": 0, "relu2": 1}
LOGITS = 2**27  # that are in memory at once
MATRICES = 3, 1, 2, 1  # of a block's layers: q, k, v; o; gate, up; down


def structure(name: str, *fields: tuple[Any, str]) -> Any:
    """A struct of fused.c, from types and the names of fields that have them."""
    pairs = [(field, kind) for kind, names in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
Matrix = structure("Matrix", (integer, "layer rows K"), (real, "scale"), (pointer, "weights"))
Packing = structure("Packing", (integer, "bf16 ternary count"), (pointer, "matrices to"), (long, "bytes"))
BlockStep = structure(
    "BlockStep", (integer, "bf16 ternary act n_embd n_ff n_head n_kv_head head_dim length needed"), (long, "batch"),
    (real, "eps dropout"), (ctypes.c_uint32, "seed"), (pointer, "weights"), (pointer * 4, "saved"),
    (pointer * 3, "scratch"), (long * 4, "saved_bytes"), (long * 3, "scratch_bytes"),
    (pointer, "cos sin x out grad_out grad_x"), (pointer * 4, "norms grad_norms grad_weights"))
HeadStep = structure(
    "HeadStep", (integer, "bf16 width vocab chunk"), (long, "M"), (real, "eps weight"), (pointer, "weights scratch"),
    (long, "scratch_bytes"), (pointer, "x norm targets losses rstd grad_rows grad_head grad_x grad_norm"))
MuonStep = structure("MuonStep", (integer, "bf16 count"), (pointer, "rows columns weights momenta grads"),
                     (real, "momentum rate decay"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None with a note where they cannot be had: then plain torch runs."""
    try:
        if sys.platform != "linux":  # they run on the threads of the libgomp that torch has there
            raise NoKernel("the kernels of training are for Linux")
        lib = prepared(ctypes.CDLL(str(compile_kernels(SOURCE, openmp=True))))
        if not lib.fused_ready():
            raise NoKernel("the system keeps this CPU's matrix registers to itself")
    except (NoKernel, OSError) as why:
        print(f"note: {why}; training in plain PyTorch, which is slower", file=sys.stderr)
        return None
    return lib


STRUCTURES = Matrix, Packing, BlockStep, HeadStep, MuonStep


def prepared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions."""
    sizes = (long * len(STRUCTURES)).in_dll(lib, "fused_sizes")
    assert [*sizes] == [ctypes.sizeof(one) for one in STRUCTURES], "a struct is not what fused.c takes it for"
    signatures = {name: [ctypes.POINTER(step)] for step, names in (
        (Packing, "pack_bytes pack"), (BlockStep, "block_bytes block_forward block_backward"),
        (HeadStep, "head_bytes head_forward head_backward"), (MuonStep, "muon")) for name in names.split()}
    signatures |= {"quantize": [integer] * 2 + [pointer] * 4, "multiply": [integer] * 3 + [pointer] * 4}
    for name, arguments in signatures.items():
        function = getattr(lib, f"fused_{name}")
        function.restype, function.argtypes = None, arguments
    return lib


def call(name: str, *arguments: Any) -> None:
    """A function of fused.c; structures are passed by address."""
    lib = library()
    assert lib is not None
    getattr(lib, f"fused_{name}")(*arguments)


def memory(size: int) -> Tensor:
    """So many bytes."""
    return torch.empty(size, dtype=torch.uint8)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def fits(config: ModelConfig, tokens: Tensor) -> bool:
    """Whether the kernels can take a step of this shape here."""
    return (tokens.device.type == "cpu" and not torch.compiler.is_compiling() and compute_dtype() is not None
            and config.n_embd % 16 == config.n_ff % 16 == config.head_dim % 32 == tokens.shape[1] % 16 == 0
            and library() is not None)


def compute_dtype() -> torch.dtype | None:
    """The dtype of the products, None where it is one that the kernels do not know."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return dtype if dtype in (torch.bfloat16, torch.float32) else None


# ---------------------------------------------------------------------------------------------------- weights
class PackedWeights:
    """The weights (N, K) of some layers, those of a layer side by side, packed for the products of an optimizer step
    (layout: matmul.h). scales: what the trits of each matrix are worth, where they are `ternary`."""

    def __init__(self, layers: tuple[tuple[Tensor, ...], ...], dtype: torch.dtype, ternary: bool = False) -> None:
        matrices = [(i, *weight.shape, 1.0, address(weight)) for i, layer in enumerate(layers) for weight in layer]
        array = (Matrix * len(matrices))(*matrices)
        step = Packing(bf16=dtype == torch.bfloat16, ternary=ternary, count=len(matrices),
                       matrices=ctypes.addressof(array))
        call("pack_bytes", step)
        self.memory = memory(step.bytes)
        step.to = address(self.memory)
        call("pack", step)
        self.ternary, self.scales = ternary, [matrix.scale for matrix in array]


_cache: dict[tuple[int, torch.dtype], PackedWeights] | None = None


@contextlib.contextmanager
def cached_weights(hold: bool = True) -> Iterator[None]:
    """Within this context no weight changes, so that each is packed or quantized once for all batches. hold=False packs
    every time, which saves memory where weights are spread over processes."""
    global _cache
    outer, _cache = _cache, {} if hold else None
    try:
        yield
    finally:
        _cache = outer


def cached(what: Any, dtype: torch.dtype, make: Callable[[], PackedWeights]) -> PackedWeights:
    """The packed weights of `what`, made now if they are not in the cache."""
    if _cache is None:
        return make()
    if (id(what), dtype) not in _cache:
        _cache[id(what), dtype] = make()
    return _cache[id(what), dtype]


# ---------------------------------------------------------------------------------------------------- a block
class Shape(NamedTuple):
    """Of a block, beside what its tensors say. dropout: of probabilities and of what is added to the stream."""

    n_head: int
    n_kv_head: int
    act: str
    eps: float
    dropout: float
    seed: int


class Block(torch.autograd.Function):
    """needed: for backward. weights: the norms of the four layers (or None), then the matrices of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, shape: Shape, packed: PackedWeights, dtype: torch.dtype,
                needed: bool, *weights: Any) -> Tensor:
        (B, T, C), x = x.shape, x.contiguous()
        step = BlockStep(
            bf16=dtype == torch.bfloat16, ternary=packed.ternary, act=ACTS[shape.act], n_embd=C,
            n_ff=weights[-1].shape[1], n_head=shape.n_head, n_kv_head=shape.n_kv_head, head_dim=C // shape.n_head,
            length=T, needed=needed, batch=B, eps=shape.eps, dropout=shape.dropout, seed=shape.seed,
            weights=address(packed.memory))
        call("block_bytes", step)
        tensors, out = (x, cos, sin, *map(memory, step.saved_bytes), *weights[:4]), torch.empty_like(x)
        bind(step, *tensors)
        step.out = address(out)
        call("block_forward", step)
        if needed:
            ctx.save_for_backward(*tensors)
            ctx.step, ctx.weights = step, packed
            ctx.shapes = [weight.shape for weight in weights[4:]]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step, (x, *saved) = ctx.step, ctx.saved_tensors
        bind(step, x, *saved)  # checkpointing computes them again, elsewhere
        grad, grad_x, norms = grad.contiguous(), torch.empty_like(x), saved[-4:]
        scratch = [memory(size) for size in step.scratch_bytes]
        step.scratch[:] = [address(piece) for piece in scratch]
        step.grad_out, step.grad_x = address(grad), address(grad_x)
        grad_norms = [None if norm is None else torch.empty_like(norm) for norm in norms]
        step.grad_norms[:] = [address(grad) for grad in grad_norms]
        shapes, parts = iter(ctx.shapes), list[Tensor]()
        for i, count in enumerate(MATRICES):
            heights, widths = zip(*(next(shapes) for _ in range(count)), strict=True)
            together = torch.empty(sum(heights), widths[0])
            step.grad_weights[i] = address(together)
            parts += together.split_with_sizes(heights)
        call("block_backward", step)
        return grad_x, None, None, None, None, None, None, *grad_norms, *parts


def bind(step: Any, x: Tensor, cos: Tensor, sin: Tensor, *others: Tensor | None) -> None:
    """BlockStep to where its tensors are; others: what the layers keep, and their norms."""
    step.x, step.cos, step.sin = address(x), address(cos), address(sin)
    step.saved[:], step.norms[:] = [address(piece) for piece in others[:4]], [address(norm) for norm in others[4:]]


def block(x: Tensor, cos: Tensor, sin: Tensor, shape: Shape, norms: tuple[Any, ...],
          linears: tuple[tuple[Any, ...], ...]) -> Tensor:
    """The residual stream x (B, T, C) behind a block.

    norms: before q, k, v; before o; before gate, up; before down: an RMSNorm each, or None. linears: of these layers.
    """
    dtype = compute_dtype()
    assert dtype is not None
    weights = tuple(tuple(linear.weight for linear in layer) for layer in linears)
    first = linears[0][0]
    return Block.apply(x, cos, sin, shape, cached(first, dtype, lambda: first.packed(weights, dtype)), dtype,
                       torch.is_grad_enabled(), *(norm and norm.weight for norm in norms), *itertools.chain(*weights))


# ---------------------------------------------------------------------------------------------------- loss
class Loss(torch.autograd.Function):
    """Mean cross-entropy of the head's logits, no more than LOGITS of which are in memory at once: their gradients are
    computed with them. Forward does the work of both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, head: Tensor, packed: PackedWeights, targets: Tensor, eps: float,
                dtype: torch.dtype, needed: bool) -> Tensor:
        (M, C), V, x = (targets.numel(), x.shape[-1]), len(head), x.contiguous()
        chunk = min(-(-M // 32) * 32, max(32, LOGITS // V // 32 * 32))
        losses, rstd = torch.empty(M), torch.empty(M)
        grad_rows = torch.empty(M, C, dtype=dtype) if needed else None
        grad_head = torch.empty(V, C) if needed else None
        step = HeadStep(
            bf16=dtype == torch.bfloat16, width=C, vocab=V, chunk=chunk, M=M, eps=eps, weight=1 / M if needed else 0.0,
            weights=address(packed.memory), x=address(x), norm=address(norm), targets=address(targets),
            losses=address(losses), rstd=address(rstd), grad_rows=address(grad_rows), grad_head=address(grad_head))
        call("head_bytes", step)
        scratch = memory(step.scratch_bytes)
        step.scratch = address(scratch)
        call("head_forward", step)
        ctx.step = step
        ctx.save_for_backward(x, norm, rstd, grad_rows, grad_head)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, rstd, grad_rows, grad_head = ctx.saved_tensors
        if grad != 1:
            grad_rows, grad_head = grad_rows * grad, grad_head * grad
        grad_x, grad_norm = torch.empty_like(x), torch.empty_like(norm)
        step = ctx.step
        step.x, step.norm, step.rstd, step.grad_rows = address(x), address(norm), address(rstd), address(grad_rows)
        step.grad_x, step.grad_norm = address(grad_x), address(grad_norm)
        call("head_backward", step)
        return grad_x, grad_norm, grad_head, None, None, None, None, None


def loss(x: Tensor, norm: Any, head: Tensor, targets: Tensor) -> Tensor:
    """Nats per token, mean over targets (M), of what the head (V, C) makes of the normed stream x (B, T, C)."""
    dtype = compute_dtype()
    assert dtype is not None
    packed = cached(head, dtype, lambda: PackedWeights(((head.detach(),),), dtype))
    return Loss.apply(x, norm.weight, head, packed, targets.long().contiguous(), norm.eps, dtype,
                      torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------------------- optimizer
def fit_matrices(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> bool:
    """Whether the kernels can take Muon's step of these here. A thread takes a whole matrix."""
    return (len(weights) >= torch.get_num_threads() and library() is not None
            and all(weight.shape[0] % 16 == weight.shape[1] % 16 == 0 for weight in weights)
            and all(tensor.is_contiguous() for tensor in (*weights, *momenta))
            and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32
                    for tensor in (*weights, *grads, *momenta)))


def muon(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], dtype: torch.dtype, momentum: float,
         rate: float, decay: float) -> None:
    """Muon's step of matrices (N, K), each with its gradient and its momentum, with products in dtype."""
    n = len(weights)
    grads = [grad.contiguous() for grad in grads]
    arrays: list[Any] = [(ctypes.c_int * n)(*(weight.shape[i] for weight in weights)) for i in (0, 1)]
    arrays += [(ctypes.c_void_p * n)(*map(address, tensors)) for tensors in (weights, momenta, grads)]
    call("muon", MuonStep(dtype == torch.bfloat16, n, *map(ctypes.addressof, arrays), momentum, rate, decay))
