"""The training step of both twins on a CPU, in few passes over memory: what stands between two matrix products is one
call of fused.c, and a product is torch's, in bf16 (int8 for the ternary twin's forward) or fp32.

    stream, qkv = products(stream, attn_norm, (q_proj, k_proj, v_proj))      # norm, quantize, multiply
    y = attention(qkv, ...)                                                  # rotate, attend
    stream, update = products(y, sub_norm, (o_proj,))

gpt/model.py has the same in plain torch, which runs everywhere else (GPUs, no compiler, odd widths) and is what these
are tested against. Shapes as there; M = B * T tokens, K inputs and N outputs of a product.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.config import ModelConfig
from engine.build import NoKernel, compile_kernels

SUM, PLAIN, GATED = range(3)
ACTS = {"silu": 0, "relu2": 1}
QUERIES = 256        # that are scored at once: of what lies above the diagonal, most is never computed in long contexts
PAD = 64             # behind a turned row: rows that are a power of two apart push each other out of the caches
LOGITS = 2**27       # that are in memory at once

SIGNATURES = {  # of fused.c, a letter an argument
    "stage_forward": "iiiliPPPPrPPPPPPl", "stage_backward": "iiiliPPPPPPPPPPPPi",
    "rotate": "iiliiiiPPPPPPPP", "softmax": "iliiirPP", "cross_entropy": "iliPPrP", "swap": "iliiiPP",
    "weight_grad": "ilPPP", "ternarize": "liPrP", "unpack_trits": "iliPP", "ternary_product": "iliiPPPP",
}
LETTERS = {"P": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "r": ctypes.c_float}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had, which is said: then plain torch runs."""
    if sys.platform != "linux":  # they run on the threads of the libgomp that torch has there
        return None
    try:
        lib = ctypes.CDLL(str(compile_kernels("fused")))
        for name, letters in SIGNATURES.items():
            function = getattr(lib, f"fused_{name}")
            function.restype, function.argtypes = None, [LETTERS[letter] for letter in letters]
    except (NoKernel, OSError) as why:
        print(f"note: {why}; training in plain torch, which takes longer", file=sys.stderr)
        return None
    return lib


@functools.cache
def has_ternary_product() -> bool:
    """Whether the kernels multiply int8 by trits here; else torch does."""
    lib = library()
    return lib is not None and bool(lib.fused_has_product())


def call(name: str, *arguments: Any) -> None:
    lib = library()
    assert lib is not None
    getattr(lib, f"fused_{name}")(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def fits(config: ModelConfig, tokens: Tensor) -> bool:
    """Whether the kernels can take a step of this shape here."""
    return (tokens.device.type == "cpu" and not torch.compiler.is_compiling() and compute_dtype() is not None
            and config.n_embd % 16 == config.n_ff % 16 == config.head_dim % 32 == tokens.shape[1] % 16 == 0
            and library() is not None)


def compute_dtype() -> torch.dtype | None:
    """The dtype of the products, None where it is one that the kernels do not know."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return dtype if dtype in (torch.bfloat16, torch.float32) else None


# ---------------------------------------------------------------------------------------------------- operands
class Operand(Protocol):
    """The weights of some layers with one input, as the products of one optimizer step want them."""

    quantized: bool  # whether the input is to be int8

    @property
    def columns(self) -> Tensor | None:
        """fp32 (N): what one step of a column's weights is worth; None: 1"""

    def product(self, n: Tensor) -> Tensor:
        """y (M, N) of n (M, K), columns applied."""

    def matrix(self) -> Tensor:
        """(N, K) in the dtype of the products, columns not applied."""


class FloatOperand:
    """(N, K) of nn.Linear's weights."""

    columns, quantized = None, False

    def __init__(self, weights: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        self.weight = side_by_side(weights, dtype)

    def product(self, n: Tensor) -> Tensor:
        return n @ self.weight.t()

    def matrix(self) -> Tensor:
        return self.weight


def side_by_side(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """(N, K) of all rows of the weights."""
    made = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype)
    for part, weight in zip(made.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight.detach())
    return made


_held: dict[tuple[int, torch.dtype], Operand] | None = None


@contextlib.contextmanager
def weights_held(hold: bool = True) -> Iterator[None]:
    """While no weight changes: they are cast or quantized once, however many batches go through. Not to `hold` saves
    the memory of that, where weights are spread over processes."""
    global _held
    outer, _held = _held, {} if hold else None
    try:
        yield
    finally:
        _held = outer


def operand(linears: tuple[Any, ...], dtype: torch.dtype) -> Operand:
    key = id(linears[0]), dtype
    if _held is not None and key in _held:
        return _held[key]
    made: Operand = linears[0].operand(tuple(linear.weight for linear in linears), dtype)
    if _held is not None:
        _held[key] = made
    return made


# ---------------------------------------------------------------------------------------------------- products
class Values(NamedTuple):
    """The products of a layer, y (M, N), to be multiplied with `rows` (M) where there are any. What flows back along y
    is the gradient of what `rows` and `columns` (N) multiply: of a ternary layer's integer sums."""

    y: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    def plain(self) -> Tensor:
        """All scales applied, for torch to go on with."""
        return self.y if self.rows is None else Scaled.apply(*self)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return (y * rows.unsqueeze(1)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        return (grad * rows.unsqueeze(1) * columns).to(grad.dtype), None, None


class Staged(NamedTuple):
    """total: the sum (M, K), for kind SUM. n: what goes into the product (M, K), int8 with padding. scale (M): what one
    step of int8 is worth. inverse (M): of the rms. kept: n for backward, turned, (K, M), but in fp32."""

    total: Tensor | None
    n: Tensor
    scale: Tensor | None
    inverse: Tensor | None
    kept: Tensor


class Stage:
    """One pass from the rows that go into a norm to what goes into a product, and the way back.

    x (M, K): the residual stream, for kind SUM. y (M, K), or (M, 2 K) for kind GATED, with rows and columns: Values.
    weight (K): of the norm, None without one."""

    def __init__(self, kind: int, act: str, eps: float) -> None:
        self.kind, self.act, self.eps = kind, ACTS[act], eps

    def forward(self, x: Tensor | None, y: Tensor | None, rows: Tensor | None, weight: Tensor | None,
                dtype: torch.dtype, quantized: bool, turn: bool) -> Staged:
        """quantized: to int8, else to dtype. turn: whether backward will ask for what is kept."""
        like = x if x is not None else y
        assert like is not None
        M, K = like.shape[0], like.shape[1] // (2 if self.kind == GATED else 1)
        total = torch.empty_like(x) if x is not None and y is not None else None
        out = torch.empty(M + 31, -(-K // 64) * 64, dtype=torch.int8) if quantized else torch.empty(M, K, dtype=dtype)
        turned = torch.empty(K, M + PAD, dtype=out.dtype) if turn and dtype == torch.bfloat16 else None
        scale = torch.empty(M) if quantized else None
        inverse = torch.empty(M) if weight is not None else None
        call("stage_forward", self.kind, dtype == torch.bfloat16, self.act, M, K, x, y, rows, weight, self.eps, total,
             None if quantized else out, out if quantized else None, scale, inverse, turned, M + PAD)
        return Staged(x if total is None else total, out, scale, inverse, out if turned is None else turned)

    def backward(self, total: Tensor | None, y: Tensor | None, rows: Tensor | None, columns: Tensor | None,
                 weight: Tensor | None, inverse: Tensor | None, grad: Tensor, scale: Tensor | None,
                 grad_total: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of x, y and weight, from those of n (M, K), of its integers where it has a scale, and total."""
        M, K = grad.shape
        grad_x = torch.empty(M, K) if self.kind == SUM else None
        grad_y = None if y is None else torch.empty(M, y.shape[1], dtype=grad.dtype)
        grad_weight = torch.zeros(torch.get_num_threads(), K)
        call("stage_backward", self.kind, grad.dtype == torch.bfloat16, self.act, M, K, total,
             None if self.kind == SUM else y, rows, columns, weight, inverse, grad, scale, grad_total, grad_x, grad_y,
             grad_weight, len(grad_weight))
        return grad_x, grad_y, None if weight is None else grad_weight.sum(0)


class Products(torch.autograd.Function):
    """stage, then x @ W.T for all W of `weights` side by side."""

    @staticmethod
    def forward(ctx: Any, stage: Stage, operand: Operand, dtype: torch.dtype, x: Tensor | None, y: Tensor | None,
                rows: Tensor | None, columns: Tensor | None, norm: Tensor | None,
                *weights: Tensor) -> tuple[Tensor | None, ...]:
        total, n, scale, inverse, kept = stage.forward(x, y, rows, norm, dtype, operand.quantized,
                                                       ctx.needs_input_grad[-1])
        ctx.stage, ctx.operand, ctx.heights = stage, operand, [len(weight) for weight in weights]
        if stage.kind == SUM and y is not None:
            y = y[:0]  # of which only the width is needed
        ctx.save_for_backward(total, y, rows, columns, norm, inverse, kept, scale)
        ctx.set_materialize_grads(False)
        out = operand.product(n)
        ctx.mark_non_differentiable(*(t for t in (scale, operand.columns) if t is not None))
        return total, out, scale, operand.columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        total, y, rows, columns, norm, inverse, kept, scale = ctx.saved_tensors
        grad_n = grad @ ctx.operand.matrix()                                          # (M, K)
        grad_weights: tuple[Tensor | None, ...] = (None,) * len(ctx.heights)
        if ctx.needs_input_grad[-1]:
            grad_weights = weight_grad(kept, grad_n.shape[1], grad, ctx.operand.columns).split(ctx.heights)
        grad_total = None if grad_total is None else grad_total.contiguous()
        grad_x, grad_y, grad_norm = ctx.stage.backward(
            total, y, rows, columns, norm, inverse, grad_n, scale, grad_total)
        return None, None, None, grad_x, grad_y, None, None, grad_norm, *grad_weights


def weight_grad(kept: Tensor, K: int, grad: Tensor, columns: Tensor | None) -> Tensor:
    """fp32 (N, K) = (grad / columns).T @ n, of grad (M, N) and n (M, K) as Stage.forward has kept it."""
    M, N = grad.shape
    if grad.dtype == torch.float32:
        made = grad.t() @ kept[:M, :K].float()
        return made if columns is None else made.div_(columns.unsqueeze(1))
    made = torch.empty(N, K)
    call("weight_grad", K, N, kept.to(torch.bfloat16)[:, :M] @ grad, columns, made)
    return made


def products(inputs: tuple[Tensor, Values | None] | Values, norm: Any, linears: tuple[Any, ...],
             act: str = "") -> tuple[Tensor, Values]:
    """(residual stream, products of its norm with the linears, side by side).

    inputs: the residual stream (M, K) and what is to be added to it; or the rows themselves, (M, K), or with `act`
    gate and up side by side, (M, 2 K). norm: an RMSNorm, or None.
    """
    x, values = (None, inputs) if isinstance(inputs, Values) else inputs
    dtype = compute_dtype()
    assert dtype is not None
    stage = Stage(GATED if act else SUM if x is not None else PLAIN, act or "silu", norm.eps if norm else 0.0)
    total, y, rows, columns = Products.apply(
        stage, operand(linears, dtype), dtype, x, *(values or (None, None, None)), norm.weight if norm else None,
        *(linear.weight for linear in linears))
    return total, Values(y, rows, columns)


# ---------------------------------------------------------------------------------------------------- attention
class Attention(torch.autograd.Function):
    """Causal attention of q, k, v side by side (M, (H + 2 G) D), rotated here; (M, H D)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Tensor | None, columns: Tensor | None, cos: Tensor, sin: Tensor,
                H: int, G: int) -> Tensor:
        T, D = cos.shape[0], 2 * cos.shape[1]
        B, bf16 = len(qkv) // T, qkv.dtype == torch.bfloat16
        q = torch.empty(B * H, T, D, dtype=qkv.dtype)
        k, v = torch.empty(2, B * G, T, D, dtype=qkv.dtype)
        call("rotate", bf16, False, B, T, H, G, D, cos, sin, rows, None, qkv, q, k, v)
        keys, values = (x.view(B, G, 1, T, D).expand(B, G, H // G, T, D).reshape(B * H, T, D) for x in (k, v))
        scores, parts = [], []
        for a in range(0, T, QUERIES):
            b = min(a + QUERIES, T)
            p = torch.bmm(q[:, a:b], keys[:, :b].transpose(1, 2))                     # (B H, Q, b)
            call("softmax", bf16, B * H, b - a, a, b, D**-0.5, p, None)
            parts.append(torch.bmm(p, values[:, :b]))
            scores.append(p)
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        ctx.shape = B, T, H, G, D
        ctx.save_for_backward(rows, columns, cos, sin, q, keys, values, *scores)
        merged = torch.empty(B * T, H * D, dtype=qkv.dtype)
        call("swap", bf16, B, H, T, D, y, merged)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, cos, sin, q, keys, values, *scores = ctx.saved_tensors
        B, T, H, G, D = ctx.shape
        bf16 = grad.dtype == torch.bfloat16
        grad_y = torch.empty_like(q)
        parts: list[Tensor] = []
        call("swap", bf16, B, T, H, D, grad.contiguous(), grad_y)
        for i, p in reversed(list(enumerate(scores))):  # the last has seen all keys
            a, b = i * QUERIES, p.shape[2]
            g = torch.bmm(grad_y[:, a:b], values[:, :b].transpose(1, 2))              # (B H, Q, b)
            for_v = torch.bmm(p.transpose(1, 2), grad_y[:, a:b])
            call("softmax", bf16, B * H, b - a, a, b, D**-0.5, g, p)
            parts.insert(0, torch.bmm(g, keys[:, :b]))
            for_k = torch.bmm(g.transpose(1, 2), q[:, a:b])
            if b == T:
                grad_k, grad_v = (for_k, for_v) if a == 0 else (for_k.float(), for_v.float())
            else:
                grad_k[:, :b] += for_k
                grad_v[:, :b] += for_v
        grad_q = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if H > G:
            grad_k, grad_v = (x.view(B, G, H // G, T, D).sum(2) for x in (grad_k, grad_v))
        grad_k, grad_v = grad_k.to(q.dtype), grad_v.to(q.dtype)
        grad_qkv = torch.empty(B * T, (H + 2 * G) * D, dtype=q.dtype)
        call("rotate", bf16, True, B, T, H, G, D, cos, sin, rows, columns, grad_qkv, grad_q, grad_k, grad_v)
        return grad_qkv, None, None, None, None, None, None


def attention(qkv: Values, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int) -> Values:
    return Values(Attention.apply(*qkv, cos, sin, n_head, n_kv_head))


# ---------------------------------------------------------------------------------------------------- loss
class Loss(torch.autograd.Function):
    """Mean cross-entropy of the head's logits, which are never in memory all at once: their gradients are computed
    with them. Forward does the work of both ways."""

    @staticmethod
    def forward(ctx: Any, stage: Stage, dtype: torch.dtype, needs_grad: bool, x: Tensor, y: Tensor | None,
                rows: Tensor | None, columns: Tensor | None, norm: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        total, n, _, inverse, kept = stage.forward(x, y, rows, norm, dtype, False, needs_grad)
        (M, K), V, bf16 = n.shape, len(head), dtype == torch.bfloat16
        weight = head.detach().to(dtype)                                              # (V, K)
        losses = torch.empty(M)
        grad_n = torch.empty_like(n) if needs_grad else None
        grad_head: Tensor | None = None                                               # (V, K)
        for a in range(0, M, max(16, LOGITS // V)):
            b = min(M, a + max(16, LOGITS // V))
            logits = n[a:b] @ weight.t()
            call("cross_entropy", bf16, b - a, V, logits, targets[a:b], 1 / M if needs_grad else 0.0, losses[a:b])
            if grad_n is None:
                continue
            torch.mm(logits, weight, out=grad_n[a:b])
            part = weight_grad(kept[:, a:] if bf16 else n[a:b], K, logits, None)
            grad_head = part if grad_head is None else grad_head.add_(part)
        ctx.stage = stage
        ctx.save_for_backward(total, None if y is None else y[:0], rows, columns, norm, inverse, grad_n, grad_head)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, y, rows, columns, norm, inverse, grad_n, grad_head = ctx.saved_tensors
        if grad != 1:
            grad_n, grad_head = grad_n * grad, grad_head * grad
        grad_x, grad_y, grad_norm = ctx.stage.backward(total, y, rows, columns, norm, inverse, grad_n, None, None)
        return None, None, None, grad_x, grad_y, None, None, grad_norm, grad_head, None


def loss(x: Tensor, update: Values | None, norm: Any, head: Tensor, targets: Tensor) -> Tensor:
    """Nats per token, mean over targets (M), of what the head (V, K) makes of the normed stream."""
    return Loss.apply(Stage(SUM, "silu", norm.eps), compute_dtype(), torch.is_grad_enabled(), x,
                      *(update or (None, None, None)), norm.weight, head, targets.long())
