"""The Triton kernels as functions of tensors: which kernel, in which shape, by rule.

Nothing is tuned by trial: a CUDA graph cannot be captured around trials, and one rule for all shapes can be tested
without a GPU. Outputs are made with torch.empty, which a capture allows. Under Triton's interpreter
(TRITON_INTERPRET=1) the same functions take CPU tensors.

PDL (programmatic dependent launch, from sm_90 on): each kernel may start while the one before it ends, and waits for it
before it touches anything but weights. Every kernel launched with it must wait, on every path.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels import gpu, triton_attention
from kernels.gpu_format import BYTES, TRITS, Matrix, row_bytes
from kernels.triton_kernels import ACC, RELU2, RESIDUAL, SCALED, SILU, gemm_kernel, gemv_kernel, quantize_kernel

INTERPRETED = bool(triton.knobs.runtime.interpret)
SPLIT = 64                     # cached positions that a program of attend_kernel reads, or more of a long cache
WIDEST_FUSED = 2048            # words of a row, up to which its floats fit into a program's registers
WARPS = 8                      # of a program of gemv_kernel
FEW = 8                        # tokens, up to which each has a dot product of its own; more share tensor cores
EPILOGUES = {"acc": ACC, "scaled": SCALED, "residual": RESIDUAL, "relu2": RELU2, "silu": SILU}


class Target(NamedTuple):
    """What a launch depends on. processors: streaming multiprocessors."""

    processors: int
    pdl: bool


@functools.cache
def target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target(2, False)  # interpreted: few programs, so that they take several blocks in turn
    about = torch.cuda.get_device_properties(device)
    return Target(about.multi_processor_count, gpu.has_dependent_launch(about.major))


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def options(warps: int, pdl: bool) -> dict[str, Any]:
    """Of a launch. No fused multiply-add: products are rounded before they are added, as torch does it."""
    return {"num_warps": warps, "enable_fp_fusion": False, **({"launch_pdl": True} if pdl else {})}


class Quantized(NamedTuple):
    """x_i8 (M * limbs, row) int8, zeros beyond K; x_scale (M,) fp32; x_sum (M,) int32, see triton_kernels.py."""

    x_i8: Tensor
    x_scale: Tensor
    x_sum: Tensor


# ---------------------------------------------------------------------------------------------------- shapes
class Row(NamedTuple):
    """How a program holds a row of KW words: in a part of w0 and one of w1 words (0: none)."""

    w0: int
    w1: int

    @property
    def width(self) -> int:
        return self.w0 + self.w1


def row_shape(words: int, parts: int = 2) -> Row:
    whole = power_of_2(words)
    w0 = whole // 2
    w1 = power_of_2(max(words - w0, 32))
    return Row(whole, 0) if parts == 1 or w0 + w1 >= whole else Row(w0, w1)


def registers(rows: int, planes: int, row: Row) -> int:
    """What the words of so many quantized rows (tokens times limbs) take in a thread: four at least of each part."""
    return rows * planes * sum(max(4, width // (32 * WARPS)) for width in row if width)


def row_for(words: int, rows: int, planes: int) -> Row | None:
    """In two parts where that is less work and the registers allow it; None where they do not allow one, too."""
    fitting = (row for row in (row_shape(words), row_shape(words, 1)) if registers(rows, planes, row) <= 128)
    return next(fitting, None)


class Gemv(NamedTuple):
    """Shape of a launch of gemv_kernel: rows a block has, programs that share the blocks."""

    bn: int
    programs: int


def gemv_shape(n: int, row: Row, paired: bool, tokens: int, processors: int) -> Gemv:
    """Rows per block: a thread holds at most 24 words of weights. Two programs per SM for one token, which each of
    them quantizes first; one for several, whose sums take twice the registers. For small N blocks shrink first, down to
    warps that share a row, so that every SM has work."""
    bn = min(power_of_2(24 * 32 * WARPS // row.width + 1) // 2, 32)
    while bn > 4 and n < bn * processors:
        bn //= 2
    bn = max(bn, 2 if paired else 1)
    return Gemv(bn, min(-(-n // bn), (2 if tokens == 1 else 1) * processors))


class Gemm(NamedTuple):
    """Shape of a launch of gemm_kernel."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int


def gemm_shape(m: int, n: int, processors: int) -> Gemm:
    """Tiles as large as leave no processor idle, since each byte that a tile loads is used bm or bn times."""
    bm, bn = min(max(power_of_2(m), 16), 128), 128
    while bm > 64 and -(-m // bm) * -(-n // bn) < processors:
        bm //= 2
    if bm < 64:
        bn = 64
    return Gemm(bm, bn, 128, 3, 8 if bm * bn > 8192 else 4)


# ---------------------------------------------------------------------------------------------------- kernels
def quantize(x: Tensor, norm: Tensor | None = None, eps: float = 0.0, planes: int = TRITS, limbs: int = 1) -> Quantized:
    """x (M, K) floats, contiguous -> int8 rows for a matrix of `planes`; RMSNorm with weight `norm` first."""
    M, K = x.shape
    width = planes * row_bytes(K, planes)
    made = Quantized(torch.empty((M * limbs, width), dtype=torch.int8, device=x.device),
                     torch.empty(M, dtype=torch.float32, device=x.device),
                     torch.empty(M, dtype=torch.int32, device=x.device))
    words = width // planes // 4
    row = row_shape(words)
    pdl = target(x.device).pdl
    if M:
        quantize_kernel[(M,)](x, x if norm is None else norm, made.x_i8.view(torch.int32), made.x_scale, made.x_sum, K,
                              words // 4, eps, NORM=norm is not None, PLANES=planes, W0=row.w0, W1=row.w1, LIMBS=limbs,
                              PDL=pdl, **options(min(max(planes * row.w0 // 256, WARPS), 16), pdl))
    return made


def gemv(x: Quantized | Tensor, m: Matrix, y: Tensor, epilogue: str, row: Row, norm: Tensor | None = None,
         eps: float = 0.0, limbs: int = 1) -> None:
    """y (M, N) = x @ m.T for few tokens. x: quantized, or one token's floats, which are normed and quantized here."""
    device = target(m.w.device)
    shape = gemv_shape(m.n, row, epilogue in ("relu2", "silu"), len(y), device.processors)
    fused = isinstance(x, Tensor)
    first = x if isinstance(x, Tensor) else x.x_i8.view(torch.int32)
    x_scale, x_sum = (first, first) if isinstance(x, Tensor) else (x.x_scale, x.x_sum)
    gemv_kernel[(shape.programs,)](
        first, x_scale, x_sum, first if norm is None else norm, m.w.view(torch.int32), m.scale, y, m.n, m.k,
        m.words // 4, eps, M=y.shape[0], FUSED=fused, NORM=norm is not None, PLANES=m.planes, W0=row.w0, W1=row.w1,
        LIMBS=limbs, BN=shape.bn, EPILOGUE=EPILOGUES[epilogue], ASM=not INTERPRETED, PDL=device.pdl,
        **options(WARPS, device.pdl))


def gemm(x_i8: Tensor, w: Tensor, y: Tensor, epilogue: str, planes: int = BYTES, x_scale: Tensor | None = None,
         w_scale: Tensor | None = None, x_sum: Tensor | None = None) -> None:
    """y (M, N), or (M, N / 2) of pairs, = x_i8 (M, .) @ w.T for many tokens; rows of both may have any stride."""
    (M, _), (N, width) = x_i8.shape, w.shape
    device = target(w.device)
    shape = gemm_shape(M, N, device.processors)
    gemm_kernel[(-(-M // shape.bm), -(-N // shape.bn))](
        x_i8, y if x_scale is None else x_scale, y if x_sum is None else x_sum, w, y if w_scale is None else w_scale, y,
        M, N, width, x_i8.stride(0), w.stride(0), int(w_scale is not None and w_scale.numel() > 1), PLANES=planes,
        BM=shape.bm, BN=shape.bn, BK=shape.bk, STAGES=shape.stages, EPILOGUE=EPILOGUES[epilogue],
        SUM=x_sum is not None, PDL=device.pdl,
        **options(shape.warps, device.pdl))


def split_of(positions: int) -> int:
    """How many positions of a cache a program reads: few, since one sequence has few heads to keep the processors busy,
    but not so few that a long cache becomes thousands of programs with nothing to do yet."""
    return SPLIT * min(4, power_of_2(positions // (512 * SPLIT)))


def linear(x: Tensor, m: Matrix, epilogue: str = "scaled", norm: Tensor | None = None, eps: float = 0.0,
           into: Tensor | None = None) -> Tensor:
    """x (M, K) fp32, normed where there is a weight for it, times a ternary matrix: fp32 (M, N).

    epilogue: scaled; residual adds to `into`; relu2 and silu give act(gate) * up (M, N / 2) of rows in turns.
    """
    M = x.shape[0]
    N = m.n // 2 if epilogue in ("relu2", "silu") else m.n
    y = torch.empty((M, N), dtype=torch.float32, device=x.device) if into is None else into
    row = row_for(m.words, M, m.planes) if M <= FEW else None
    if M == 1 and row and m.planes * row.width <= WIDEST_FUSED:
        gemv(x, m, y, epilogue, row, norm, eps)
        return y
    quantized = quantize(x, norm, eps)
    if row:
        gemv(quantized, m, y, epilogue, row)
    else:
        gemm(quantized.x_i8, m.w, y, epilogue, m.planes, quantized.x_scale, m.scale, quantized.x_sum)
    return y


def head(x: Tensor, m: Matrix, norm: Tensor, eps: float) -> Tensor:
    """Logits fp32 (M, N) of an int8 matrix and activations of 15 bits, or of a bf16 matrix."""
    M = x.shape[0]
    if m.w.dtype == torch.bfloat16:
        normed = torch.nn.functional.rms_norm(x, norm.shape, norm, eps)
        return torch.nn.functional.linear(normed.to(m.w.dtype), m.w).float()
    y = torch.empty((M, m.n), dtype=torch.float32, device=x.device)
    row = row_for(m.words, 2 * M, BYTES) if M <= FEW else None
    if M == 1 and row and row.width <= WIDEST_FUSED:
        gemv(x, m, y, "scaled", row, norm, eps, limbs=2)
        return y
    quantized = quantize(x, norm, eps, BYTES, limbs=2)
    if row:
        gemv(quantized, m, y, "scaled", row, limbs=2)
        return y
    acc_i32 = torch.empty((2 * M, m.n), dtype=torch.int32, device=x.device)
    gemm(quantized.x_i8, m.w, acc_i32, "acc")
    high, low = acc_i32.view(M, 2, m.n).float().unbind(1)
    return (high * 254 + low) * quantized.x_scale[:, None] * m.scale


def embed(tokens: Tensor, table: Matrix) -> Tensor:
    """tokens (M,) ids -> x (M, K) fp32."""
    pdl = target(tokens.device).pdl
    x = torch.empty((len(tokens), table.k), dtype=torch.float32, device=tokens.device)
    triton_attention.embed_kernel[(len(tokens), -(-table.k // 1024))](
        tokens, table.w, table.scale, x, table.k, table.w.stride(0), SCALE=table.w.dtype == torch.int8, BLOCK=1024,
        PDL=pdl, **options(4, pdl))
    return x


class Heads(NamedTuple):
    """The shape of attention: H query heads in G groups, D wide; norms of queries and keys where there are any."""

    h: int
    g: int
    d: int
    eps: float


def rotate(qkv: Tensor, heads: Heads, norms: tuple[Tensor, Tensor] | None, tables: tuple[Tensor, Tensor], start: int,
           k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """qkv (B * T, (H + 2 G) D) fp32: keys and values into the caches (B, G, S, D) from `start` on; q (B, H, T, D)."""
    B, G, S, D = k_cache.shape
    T = qkv.shape[0] // B
    pdl = target(qkv.device).pdl
    q = torch.empty((B, heads.h, T, D), dtype=torch.float16, device=qkv.device)
    q_norm, k_norm = norms or (qkv, qkv)
    triton_attention.rotate_kernel[(B * T, G)](
        qkv, q_norm, k_norm, *tables, q, k_cache, v_cache, T, start, heads.h, G, D, S, heads.eps,
        NORM=norms is not None, HGP=power_of_2(heads.h // G), D2P=power_of_2(D // 2), PDL=pdl, **options(1, pdl))
    return q


def attend(qkv: Tensor, heads: Heads, norms: tuple[Tensor, Tensor] | None, tables: tuple[Tensor, Tensor],
           length: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """One new token a sequence, qkv (B, (H + 2 G) D) fp32 -> y (B, H D) fp32; it is added to the caches behind
    `length` (one int32 on the device) tokens."""
    B, G, S, D = k_cache.shape
    H, pdl, split = heads.h, target(qkv.device).pdl, split_of(S)
    splits = -(-S // split)
    part = torch.empty((B, H, splits, D), dtype=torch.float32, device=qkv.device)
    most, total = (torch.empty((B, H, splits), dtype=torch.float32, device=qkv.device) for _ in range(2))
    q_norm, k_norm = norms or (qkv, qkv)
    triton_attention.attend_kernel[(B * G, splits)](
        qkv, q_norm, k_norm, *tables, k_cache, v_cache, length, part, most, total, H, G, D, S, 1 / math.sqrt(D),
        heads.eps, NORM=norms is not None, HGP=max(16, power_of_2(H // G)), D2P=max(16, power_of_2(D // 2)),
        DP=max(16, power_of_2(D)), BS=32, SPLIT=split, SPLITS=splits, PDL=pdl, **options(4, pdl))
    if splits == 1:
        return part.view(B, H * D)
    y = torch.empty((B, H * D), dtype=torch.float32, device=qkv.device)
    triton_attention.combine_kernel[(B * H,)](
        part, most, total, length, y, D, SPLIT=split, SPLITS=splits, DP=power_of_2(D), PDL=pdl,
        **options(1, pdl))
    return y

