"""The Triton kernels of the ternary linear layer: RMSNorm and int8 quantization, GEMV for a few tokens, GEMM for many.

    M tokens, N out_features, K in_features; a row of weights is cut into quarters (PLANES = 4) of 4 * KW columns, KW
    words. Kernels are given KV = KW / 4, so that the compiler knows every row to be whole vectors of 16 bytes:

    w  # (N, 4 * KW) uint8       byte b, bits 7..0:  t3 t3  c2 c2  c1 c1  c0 c0
                                 ci = trit of column b + i * 4 * KW, plus 1;  t3 = trit of column b + 3 * 4 * KW,
                                 as a two's complement number. Columns beyond K hold trit 0.
    x  # (M, 16 * KW) int8       plain, zeros beyond K; x_sum (M,) is the sum of its first three quarters

No code is ever shifted: masked in place, plane i is 4^i times its trit (plus 4^i, for i < 3), a signed byte. Planes are
added from the third down, acc = (acc >> 2) + plane . x, which is exact, since acc is a whole multiple of 4 there; at
the end x_sum takes the ones out again. One mask serves four weights in both kernels, and the tensor cores read the
masked bytes as they are. PLANES = 1 is a plain int8 matrix (N, K): the head, and trits in training.

For every K up to 2^19 no sum leaves int32. Rounding is that of torch, operation for operation: the kernels have to be
launched with enable_fp_fusion=False, or `a * b + c` would be rounded once. `dot4` is the one place that differs under
Triton's interpreter. launch.py chooses shapes and launches; gpu_format.py packs.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: x + ROUND has x, rounded half to even, in its lowest bits; |x| < 2^22
ACC, SCALED, RESIDUAL, RELU2, SILU = (tl.constexpr(i) for i in range(5))  # what becomes of a sum of products; the
# last two are for pairs of rows, gate and up


@triton.jit
def dot4(a, b, c, ASM: tl.constexpr):
    """c + a . b, where a and b are four signed bytes each."""
    if ASM:
        return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32,
                                         is_pure=True, pack=1)
    for byte in tl.static_range(4):
        c += (a << (24 - 8 * byte) >> 24) * (b << (24 - 8 * byte) >> 24)
    return c


@triton.jit
def inverse_rms(squares, width, eps):
    """1 / sqrt(mean + eps) of a sum of `width` squares."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, width * 1.0) + eps))


@triton.jit
def row_part(row_ptr, part: tl.constexpr, p: tl.constexpr, K, KW, W0: tl.constexpr, W1: tl.constexpr):
    """Plane p of a part of a row of floats: fp32 (words, 4), zeros outside."""
    i = part * W0 + tl.arange(0, W1 if part else W0)[:, None]
    column = 4 * (p * KW + i) + tl.arange(0, 4)[None, :]
    return tl.load(row_ptr + column, (i < KW) & (column < K), other=0).to(tl.float32)


@triton.jit
def quantized_row(x_ptr, norm_ptr, K, KW, eps, NORM: tl.constexpr, PLANES: tl.constexpr, W0: tl.constexpr,
                  W1: tl.constexpr, LIMBS: tl.constexpr, PDL: tl.constexpr):
    """A token's activations, normed where NORM: (words, x_scale, x_sum). words: for each part of the row, W0 and W1
    words wide, for each limb, each plane's int32 of four int8. Two limbs hold 15 bits: 254 high + low."""
    PARTS: tl.constexpr = 2 if W1 else 1
    EARLY: tl.constexpr = PLANES * (W0 + W1) <= 2048  # norm's weights before the wait, if there are registers for them
    j = tl.arange(0, 4)
    weights, xs = (), ()
    if NORM and EARLY:
        for part in tl.static_range(PARTS):
            for p in tl.static_range(PLANES):
                weights = weights + (row_part(norm_ptr, part, p, K, KW, W0, W1),)
    if PDL:
        gdc_wait()
    squares, top = 0.0, 0x3727C5AC  # bits of 1e-5. As bits NaN is the largest, which max() of floats would drop
    for part in tl.static_range(PARTS):
        square = tl.zeros((W1 if part else W0, 4), tl.float32)
        for p in tl.static_range(PLANES):
            x = row_part(x_ptr, part, p, K, KW, W0, W1)
            square += x * x
            xs = xs + (x,)
        squares += tl.sum(tl.sum(square, 1), 0)
    if NORM:
        inverse = inverse_rms(squares, K, eps)
        normed = ()
        for part in tl.static_range(PARTS):
            for p in tl.static_range(PLANES):
                weight = weights[part * PLANES + p] if EARLY else row_part(norm_ptr, part, p, K, KW, W0, W1)
                normed = normed + (xs[part * PLANES + p] * inverse * weight,)
        xs = normed
    for part in tl.static_range(PARTS):
        most = tl.zeros((W1 if part else W0, 4), tl.float32)
        for p in tl.static_range(PLANES):
            most = tl.maximum(most, tl.abs(xs[part * PLANES + p]), propagate_nan=tl.PropagateNan.ALL)
        top = tl.maximum(top, tl.max(tl.max(most.to(tl.int32, bitcast=True), 1), 0))
    s = tl.div_rn(1.0, top.to(tl.float32, bitcast=True)) * (127.0 if LIMBS == 1 else 127.0 * 254.0)
    x_sum, words = 0, ()
    for part in tl.static_range(PARTS):
        total = tl.zeros((W1 if part else W0, 4), tl.int32)
        high, low = (), ()
        for p in tl.static_range(PLANES):
            bits = (xs[part * PLANES + p] * s + ROUND).to(tl.int32, bitcast=True)
            if LIMBS == 2:
                tens = ((bits << 10 >> 10).to(tl.float32) * (1 / 254) + ROUND).to(tl.int32, bitcast=True)
                low = low + (tl.sum(((bits - 254 * (tens << 10 >> 10)) & 255) << (8 * j)[None, :], 1),)
                bits = tens
            elif PLANES == 4 and p < 3:
                total += bits << 10 >> 10
            high = high + (tl.sum((bits & 255) << (8 * j)[None, :], 1),)
        words = words + high + low
        x_sum += tl.sum(tl.sum(total, 1), 0)
    return words, tl.div_rn(1.0, s), x_sum


@triton.jit
def quantize_kernel(x_ptr, norm_ptr, x_i8_ptr, x_scale_ptr, x_sum_ptr, K, KV, eps, NORM: tl.constexpr,
                    PLANES: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, LIMBS: tl.constexpr, PDL: tl.constexpr):
    """x (M, K) -> x_i8 (M * LIMBS, PLANES * KW) as int32 words, x_scale (M,), x_sum (M,). A program a token."""
    PARTS: tl.constexpr = 2 if W1 else 1
    ROWS: tl.constexpr = LIMBS * PLANES
    KW = 4 * KV
    if PDL:
        gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64)
    words, x_scale, x_sum = quantized_row(x_ptr + m * K, norm_ptr, K, KW, eps, NORM, PLANES, W0, W1, LIMBS, PDL)
    for part in tl.static_range(PARTS):
        i = part * W0 + tl.arange(0, W1 if part else W0)
        for row in tl.static_range(ROWS):
            tl.store(x_i8_ptr + (m * ROWS + row) * KW + i, words[part * ROWS + row], i < KW)
    tl.store(x_scale_ptr + m, x_scale)
    tl.store(x_sum_ptr + m, x_sum)


@triton.jit
def activated(gate, up, EPILOGUE: tl.constexpr):
    if EPILOGUE == RELU2:
        gate = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return gate * gate * up
    return tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up


@triton.jit
def weight_words(w_ptr, n, N, KW, W0: tl.constexpr, W1: tl.constexpr):
    """Rows n of the weights, one tensor of words for each part; zeros outside. Weights are read once a token, so they
    leave the caches to the rest."""
    w = ()
    for part in tl.static_range(2 if W1 else 1):
        i = part * W0 + tl.arange(0, W1 if part else W0)
        w = w + (tl.load(w_ptr + n[:, None].to(tl.int64) * KW + i[None, :], (n[:, None] < N) & (i[None, :] < KW),
                         other=0, eviction_policy="evict_first"),)
    return w


@triton.jit
def gemv_kernel(x_ptr, x_scale_ptr, x_sum_ptr, norm_ptr, w_ptr, w_scale_ptr, y_ptr, N, K, KV, eps, M: tl.constexpr,
                FUSED: tl.constexpr, NORM: tl.constexpr, PLANES: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
                LIMBS: tl.constexpr, BN: tl.constexpr, EPILOGUE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr):
    """y (M, N) of a few tokens; a program takes every num_programs-th block of BN whole rows of w (as int32 words).

    A row is held in one or two parts, whose widths are powers of two: with one alone, up to half of the work would be
    for nothing. FUSED (M = 1): x is the token's floats, which every program norms and quantizes for itself, rather than
    waiting for a kernel that does. Otherwise x is what quantize_kernel made. RELU2, SILU: y (M, N / 2), rows of gate
    and up in turns. The first block of weights is asked for before the kernel that makes x has ended (PDL).
    """
    PARTS: tl.constexpr = 2 if W1 else 1
    ROWS: tl.constexpr = M * LIMBS
    KW = 4 * KV
    rows = tl.arange(0, BN)
    step = tl.num_programs(0)
    if PDL:
        gdc_launch_dependents()
    w = weight_words(w_ptr, tl.program_id(0) * BN + rows, N, KW, W0, W1)
    if FUSED:
        words, x_scale, x_sum = quantized_row(x_ptr, norm_ptr, K, KW, eps, NORM, PLANES, W0, W1, LIMBS, PDL)
    else:
        if PDL:
            gdc_wait()
        words = ()
        for part in tl.static_range(PARTS):
            i = part * W0 + tl.arange(0, W1 if part else W0)
            for row in tl.static_range(ROWS * PLANES):
                words = words + (tl.load(x_ptr + row * KW + i, i < KW, other=0),)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BN), step):
        n = block * BN + rows
        ahead = weight_words(w_ptr, n + step * BN, N, KW, W0, W1)
        w_scale = tl.load(w_scale_ptr + n, n < N, other=0)
        for m in tl.static_range(M):
            if not FUSED:
                x_scale, x_sum = tl.load(x_scale_ptr + m), tl.load(x_sum_ptr + m)
            high = tl.zeros((BN,), tl.float32)
            for limb in tl.static_range(LIMBS):
                total = tl.zeros((BN,), tl.int32) - x_sum
                for part in tl.static_range(PARTS):
                    acc = tl.zeros(w[part].shape, tl.int32)
                    for p in tl.static_range(PLANES - 1, -1, -1):
                        x = words[(part * ROWS + m * LIMBS + limb) * PLANES + p]
                        plane = w[part] if PLANES == 1 else \
                            w[part] & ((0x03030303 << (2 * p)) - (p // 3 << 32))  # as int32
                        acc = dot4(plane, tl.broadcast_to(x[None, :], acc.shape), acc >> 2, ASM)
                    total += tl.sum(acc, 1)
                if limb + 1 < LIMBS:
                    high = total.to(tl.float32) * 254.0
            y = (high + total.to(tl.float32)) * x_scale * w_scale
            if EPILOGUE == ACC:
                tl.store(y_ptr + m * N + n, total, n < N)
            elif EPILOGUE >= RELU2:
                gate, up = tl.split(tl.reshape(y, (BN // 2, 2)))
                out = block * (BN // 2) + tl.arange(0, BN // 2)
                tl.store(y_ptr + m * (N // 2) + out, activated(gate, up, EPILOGUE), out < N // 2)
            else:
                if EPILOGUE == RESIDUAL:
                    y = tl.load(y_ptr + m * N + n, n < N, other=0) + y
                tl.store(y_ptr + m * N + n, y, n < N)
        w = ahead


@triton.jit
def gemm_kernel(x_ptr, x_scale_ptr, x_sum_ptr, w_ptr, w_scale_ptr, y_ptr, M, N, KQ, x_stride, w_stride, scale_step,
                PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
                EPILOGUE: tl.constexpr, SUM: tl.constexpr, PDL: tl.constexpr):
    """y (M, N) of many tokens, BM x BN of it a program, on int8 tensor cores. x int8, w bytes, KQ bytes a plane.
    scale_step: 1, or 0 where all rows of w have the one scale that w_scale holds.

    Weights are the left operand, which can be masked in registers on its way; tokens come from shared memory.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_row = x_ptr + m[None, :].to(tl.int64) * x_stride + k[:, None]
    w_row = w_ptr + n[:, None].to(tl.int64) * w_stride + k[None, :]
    acc = tl.zeros((BN, BM), tl.int32)
    for p in tl.static_range(PLANES - 1, -1, -1):
        acc = acc >> 2
        for at in tl.range(0, KQ, BK, num_stages=STAGES):
            w = tl.load(w_row + at, (n[:, None] < N) & (k[None, :] < KQ - at), other=0)
            x = tl.load(x_row + (p * KQ + at), (m[None, :] < M) & (k[:, None] < KQ - at), other=0)
            plane = w if PLANES == 1 else (w & (3 << (2 * p)))
            acc = tl.dot(plane.to(tl.int8, bitcast=True), x, acc, out_dtype=tl.int32)
    if SUM:
        acc -= tl.load(x_sum_ptr + m, m < M, other=0)[None, :]
    to = m[None, :].to(tl.int64) * N + n[:, None]
    inside = (m[None, :] < M) & (n[:, None] < N)
    if EPILOGUE == ACC:
        tl.store(y_ptr + to, acc, inside)
    else:
        x_scale = tl.load(x_scale_ptr + m, m < M, other=0)
        w_scale = tl.load(w_scale_ptr + n * scale_step, n < N, other=0)
        y = acc.to(tl.float32) * x_scale[None, :] * w_scale[:, None]
        if EPILOGUE >= RELU2:
            gate, up = tl.split(tl.reshape(tl.trans(y), (BM, BN // 2, 2)))
            out = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
            tl.store(y_ptr + m[:, None].to(tl.int64) * (N // 2) + out[None, :], activated(gate, up, EPILOGUE),
                     (m[:, None] < M) & (out[None, :] < N // 2))
        else:
            if EPILOGUE == RESIDUAL:
                y = tl.load(y_ptr + to, inside, other=0) + y
            tl.store(y_ptr + to, y, inside)
