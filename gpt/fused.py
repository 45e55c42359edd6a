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
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.config import ModelConfig
from engine.build import NoKernel, compile_kernels

ACTS = {"silu": 0, "relu2": 1}
FLOAT, BF16, INT8 = range(3)  # what a word of 4 bytes holds: 1, 2, 4 of them
SLACK = 32           # rows behind the last that a product may read
LOGITS = 2**27       # that are in memory at once


def structure(name: str, *fields: tuple[Any, str]) -> Any:
    """A struct of fused.c, from types and the names of fields that have them."""
    pairs = [(field, kind) for kind, names in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
Layer = structure("Layer", (pointer, "norm panels back columns transposed rstd scale grad_norm grad_weight"))
BlockStep = structure(
    "BlockStep", (integer, "bf16 act width hidden heads groups head length"), (ctypes.c_int64, "batch"),
    (real, "eps dropout"), (ctypes.c_uint32, "seed"), (Layer * 4, "layers"),
    (pointer, "cos sin x qkv y gate_up lse middle out sums grad_out grad_middle grad_x grad other_grad"))
HeadStep = structure(
    "HeadStep", (integer, "bf16 width vocab chunk"), (ctypes.c_int64, "M"), (real, "eps weight"),
    (pointer, "x norm panels back targets losses transposed rstd logits grad_rows grad_head grad_x grad_norm"))
MuonStep = structure("MuonStep", (integer, "bf16 count"), (pointer, "rows columns weights momenta grads"),
                     (real, "momentum rate decay"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had, which is said: then plain torch runs."""
    if sys.platform != "linux":  # they run on the threads of the libgomp that torch has there
        return None
    try:
        lib = prepared(ctypes.CDLL(str(compile_kernels("fused"))))
        if not lib.fused_ready():
            raise NoKernel("the system keeps this CPU's matrix registers to itself")
    except (NoKernel, OSError) as why:
        print(f"note: {why}; training in plain torch, which takes longer", file=sys.stderr)
        return None
    return lib


def prepared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions."""
    length = ctypes.c_int64
    for name, arguments in {
            "pack": [integer, length, integer, pointer, pointer, length, length, pointer, pointer, pointer],
            "block_forward": [pointer], "block_backward": [pointer],
            "head_forward": [pointer], "head_backward": [pointer], "muon": [pointer],
            "quantize": [integer] * 2 + [pointer] * 4, "multiply": [integer] * 3 + [pointer] * 4}.items():
        function = getattr(lib, f"fused_{name}")
        function.restype, function.argtypes = None, arguments
    return lib


def call(name: str, *arguments: Any) -> None:
    lib = library()
    assert lib is not None
    getattr(lib, f"fused_{name}")(*arguments)


def at(tensor: Tensor | None) -> int | None:
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


def lines(n: int, kind: int) -> int:
    """n, rounded up to whole cache lines of this kind."""
    return -(-n // (16 << kind)) * (16 << kind)


def rows(M: int, n: int, dtype: torch.dtype) -> Tensor:
    """Memory for M rows of n that go into a product: an odd number of lines apart, and some more that may be read."""
    kind = {torch.float32: FLOAT, torch.bfloat16: BF16, torch.int8: INT8}[dtype]
    return torch.empty(M + SLACK, (lines(n, kind) >> (4 + kind) | 1) << (4 + kind), dtype=dtype)


# ---------------------------------------------------------------------------------------------------- weights
class Operand:
    """The weights (N, K) of some layers with one input, side by side, packed for the products of an optimizer step.

    scales: (), one for each of `weights`, makes them ternary (layout of both: product.h)."""

    def __init__(self, weights: tuple[Tensor, ...], dtype: torch.dtype, scales: list[Tensor] | None = None) -> None:
        self.N, self.K = sum(map(len, weights)), weights[0].shape[1]
        bf16 = dtype == torch.bfloat16
        self.panels = torch.empty(-(-self.N // 16) * 16, lines(self.K, INT8 if scales else bf16),
                                  dtype=torch.int8 if scales else dtype)
        whole = lines(self.N, bf16)
        self.back = (torch.empty if whole == self.N else torch.zeros)(self.K, whole, dtype=dtype)
        self.columns = torch.empty(self.N) if scales else None  # what a step of a column's trits is worth
        first = 0
        for i, weight in enumerate(weights):
            call("pack", bf16, len(weight), self.K, at(weight), at(scales[i] if scales else None), first, self.N,
                 at(self.panels), at(self.back), at(self.columns))
            first += len(weight)


_held: dict[tuple[int, torch.dtype], Operand] | None = None


@contextlib.contextmanager
def weights_held(hold: bool = True) -> Iterator[None]:
    """Within this context no weight changes, so that each is packed or quantized once for all batches. hold=False packs
    every time, which saves memory where weights are spread over processes."""
    global _held
    outer, _held = _held, {} if hold else None
    try:
        yield
    finally:
        _held = outer


def held(what: Any, dtype: torch.dtype, make: Callable[[], Operand]) -> Operand:
    """The operand of `what`, made now where none is held."""
    if _held is None:
        return make()
    if (id(what), dtype) not in _held:
        _held[id(what), dtype] = make()
    return _held[id(what), dtype]


def operand(linears: tuple[Any, ...], dtype: torch.dtype) -> Operand:
    return held(linears[0], dtype, lambda: linears[0].operand(tuple(linear.weight for linear in linears), dtype))


# ---------------------------------------------------------------------------------------------------- a block
class Shape(NamedTuple):
    """Of a block, beside what its tensors say. dropout: of probabilities and of what the stream is added to."""

    heads: int
    groups: int
    act: str
    eps: float
    dropout: float
    seed: int


class Block(torch.autograd.Function):
    """needed: for backward. weights: the norms of the four layers (or None), then the matrices of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, shape: Shape, operands: tuple[Operand, ...],
                dtype: torch.dtype, needed: bool, *weights: Tensor | None) -> Tensor:
        (B, T, C), x = x.shape, x.contiguous()
        M, ternary = B * T, operands[0].columns is not None
        norms, heights = weights[:4], [len(weight) for weight in weights[4:] if weight is not None]
        kind = torch.int8 if ternary else dtype
        kept = [(rows(operand.K, M, kind) if needed else None, torch.empty(M), torch.empty(M) if ternary else None)
                for operand in operands]
        tensors = {
            "cos": cos, "sin": sin, "x": x, "qkv": torch.empty(M + SLACK, operands[0].N, dtype=dtype),
            "y": torch.empty(M, C, dtype=dtype), "gate_up": torch.empty(M, operands[2].N, dtype=dtype),
            "lse": torch.empty(B, shape.heads, T), "middle": torch.empty(M, C)}
        out = torch.empty_like(x)
        step = described(shape, operands, norms, kept, tensors)
        sums = torch.empty(M, dtype=torch.int32)
        step.out, step.sums = at(out), at(sums)
        call("block_forward", ctypes.byref(step))
        if needed:
            ctx.save_for_backward(*tensors.values(), *norms, *(tensor for layer in kept for tensor in layer))
            ctx.names, ctx.shape, ctx.operands, ctx.heights = tuple(tensors), shape, operands, heights
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, count, operands = ctx.saved_tensors, len(ctx.names), ctx.operands
        tensors, norms = dict(zip(ctx.names, saved, strict=False)), saved[count:count + 4]
        kept = [saved[i:i + 3] for i in range(count + 4, len(saved), 3)]
        step = described(ctx.shape, operands, norms, kept, tensors)
        grad, grad_x, grad_middle = grad.contiguous(), torch.empty_like(grad), torch.empty_like(grad)
        M, dtype = grad.shape[0] * grad.shape[1], tensors["y"].dtype
        two = [rows(M, max(operand.N for operand in operands), dtype) for _ in range(2)]
        step.grad_out, step.grad_middle, step.grad_x = at(grad), at(grad_middle), at(grad_x)
        step.grad, step.other_grad = map(at, two)
        grad_norms = [None if norm is None else torch.empty_like(norm) for norm in norms]
        grad_weights = [torch.empty(operand.N, operand.K) for operand in operands]
        for layer, grad_norm, grad_weight in zip(step.layers, grad_norms, grad_weights, strict=True):
            layer.grad_norm, layer.grad_weight = at(grad_norm), at(grad_weight)
        call("block_backward", ctypes.byref(step))
        heights = iter(ctx.heights)
        parts = [part for made, count in zip(grad_weights, (3, 1, 2, 1), strict=True)
                 for part in made.split([next(heights) for _ in range(count)])]
        return grad_x, None, None, None, None, None, None, *grad_norms, *parts


def described(shape: Shape, operands: tuple[Operand, ...], norms: Any, kept: Any, tensors: dict[str, Tensor]) -> Any:
    """BlockStep, without what only one of the two ways has."""
    B, T, C = tensors["x"].shape
    step = BlockStep(
        bf16=tensors["y"].dtype == torch.bfloat16, act=ACTS[shape.act], width=C, hidden=operands[3].K,
        heads=shape.heads, groups=shape.groups, head=C // shape.heads, length=T, batch=B, eps=shape.eps,
        dropout=shape.dropout, seed=shape.seed, **{name: at(tensor) for name, tensor in tensors.items()})
    for layer, operand, norm, (transposed, rstd, scale) in zip(step.layers, operands, norms, kept, strict=True):
        layer.norm, layer.panels, layer.back, layer.columns = (
            at(norm), at(operand.panels), at(operand.back), at(operand.columns))
        layer.transposed, layer.rstd, layer.scale = at(transposed), at(rstd), at(scale)
    return step


def block(x: Tensor, cos: Tensor, sin: Tensor, shape: Shape, norms: tuple[Any, ...],
          linears: tuple[tuple[Any, ...], ...]) -> Tensor:
    """The residual stream x (B, T, C) behind a block.

    norms: before q, k, v; before o; before gate, up; before down: an RMSNorm each, or None. linears: of these layers.
    """
    dtype = compute_dtype()
    assert dtype is not None
    return Block.apply(x, cos, sin, shape, tuple(operand(layer, dtype) for layer in linears), dtype,
                       torch.is_grad_enabled(), *(norm and norm.weight for norm in norms),
                       *(one.weight for layer in linears for one in layer))


# ---------------------------------------------------------------------------------------------------- loss
class Loss(torch.autograd.Function):
    """Mean cross-entropy of the head's logits, which are never in memory all at once: their gradients are computed
    with them. Forward does the work of both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, head: Tensor, operand: Operand, targets: Tensor, eps: float,
                dtype: torch.dtype, needed: bool) -> Tensor:
        (M, C), V, x = (targets.numel(), x.shape[-1]), len(head), x.contiguous()
        chunk = min(-(-M // 16) * 16, max(16, LOGITS // V // 16 * 16))
        logits = rows(chunk, V, dtype)
        losses, rstd = torch.empty(M), torch.empty(M)
        transposed = rows(C, M, dtype) if needed else None
        grad_rows = torch.empty(M, C, dtype=dtype) if needed else None
        grad_head = torch.empty(V, C) if needed else None
        ctx.step = {"bf16": dtype == torch.bfloat16, "width": C, "vocab": V, "chunk": chunk, "M": M, "eps": eps}
        step = HeadStep(
            **ctx.step, weight=1 / M if needed else 0.0, x=at(x), norm=at(norm), panels=at(operand.panels),
            back=at(operand.back), targets=at(targets), losses=at(losses), transposed=at(transposed),
            rstd=at(rstd), logits=at(logits), grad_rows=at(grad_rows), grad_head=at(grad_head))
        call("head_forward", ctypes.byref(step))
        ctx.save_for_backward(x, norm, rstd, grad_rows, grad_head)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, rstd, grad_rows, grad_head = ctx.saved_tensors
        if grad != 1:
            grad_rows, grad_head = grad_rows * grad, grad_head * grad
        grad_x, grad_norm = torch.empty_like(x), torch.empty_like(norm)
        call("head_backward", ctypes.byref(HeadStep(
            **ctx.step, x=at(x), norm=at(norm), rstd=at(rstd), grad_rows=at(grad_rows), grad_x=at(grad_x),
            grad_norm=at(grad_norm))))
        return grad_x, grad_norm, grad_head, None, None, None, None, None


def loss(x: Tensor, norm: Any, head: Tensor, targets: Tensor) -> Tensor:
    """Nats per token, mean over targets (M), of what the head (V, C) makes of the normed stream x (B, T, C)."""
    dtype = compute_dtype()
    assert dtype is not None
    packed = held(head, dtype, lambda: Operand((head.detach(),), dtype))
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
    arrays += [(ctypes.c_void_p * n)(*map(at, tensors)) for tensors in (weights, momenta, grads)]
    call("muon", ctypes.byref(MuonStep(dtype == torch.bfloat16, n, *map(ctypes.addressof, arrays), momentum, rate,
                                       decay)))
