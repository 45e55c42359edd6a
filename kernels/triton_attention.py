"""What a ternary model needs beside its linear layers, in Triton: embedding, rotary positions, decoding attention.

    B sequences, H query heads in G groups of H / G, D head width, S positions in the cache
    qkv  # (B * T, (H + 2 G) * D) fp32, query heads first; caches # (B, G, S, D) fp16, of one layer

Position and length are read from memory, not given as numbers: a captured decode step serves every position. Each head
is handled in halves (i pairs with i + D / 2), so that rotating needs no shuffle. Launched by launch.py.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_kernels import inverse_rms


@triton.jit
def embed_kernel(tokens_ptr, table_ptr, scale_ptr, x_ptr, C, stride, SCALE: tl.constexpr, BLOCK: tl.constexpr,
                 PDL: tl.constexpr):
    """x (M, C) fp32 = the tokens' rows of an int8 table with a scale a row, or of a bf16 table."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tokens_ptr + m).to(tl.int64)
    x = tl.load(table_ptr + row * stride + c, c < C, other=0).to(tl.float32)
    if SCALE:
        x *= tl.load(scale_ptr + row)
    tl.store(x_ptr + m * C + c, x, c < C)


@triton.jit
def half(x):
    """fp16, without infinities."""
    return tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def rotated(head_ptr, heads, inside, norm_ptr, cos_ptr, sin_ptr, position, D, eps, NORM: tl.constexpr,
            D2P: tl.constexpr):
    """The two halves (heads, D2P) of some heads, normed where NORM and rotated to a position. arXiv 2104.09864"""
    d = tl.arange(0, D2P)
    D2 = D // 2
    mask = inside[:, None] & (d[None, :] < D2)
    a = tl.load(head_ptr + heads[:, None] * D + d[None, :], mask, other=0)
    b = tl.load(head_ptr + heads[:, None] * D + (D2 + d)[None, :], mask, other=0)
    if NORM:
        inverse = inverse_rms(tl.sum(a * a, 1) + tl.sum(b * b, 1), D, eps)[:, None]
        a = a * inverse * tl.load(norm_ptr + d, d < D2, other=0)[None, :]
        b = b * inverse * tl.load(norm_ptr + D2 + d, d < D2, other=0)[None, :]
    cos = tl.load(cos_ptr + position * D2 + d, d < D2, other=0)[None, :]
    sin = tl.load(sin_ptr + position * D2 + d, d < D2, other=0)[None, :]
    return a * cos - b * sin, b * cos + a * sin


@triton.jit(do_not_specialize=["T", "start"])  # of chunks: else compiled anew for 1 and for multiples of 16
def rotate_kernel(qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, q_ptr, k_cache_ptr, v_cache_ptr, T, start, H, G, D,
                  S, eps, NORM: tl.constexpr, HGP: tl.constexpr, D2P: tl.constexpr, PDL: tl.constexpr):
    """Queries of T tokens a sequence -> q (B, H, T, D) fp16; their keys and values into the cache, from `start` on."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, g = tl.program_id(0), tl.program_id(1)
    sequence, t = token // T, token % T
    row = qkv_ptr + token.to(tl.int64) * (H + 2 * G) * D
    heads, one = tl.arange(0, HGP), tl.arange(0, 1)
    d = tl.arange(0, D2P)
    q_a, q_b = rotated(row + g * (H // G) * D, heads, heads < H // G, q_norm_ptr, cos_ptr, sin_ptr, start + t, D, eps,
                       NORM, D2P)
    to = q_ptr + ((sequence * H + g * (H // G) + heads[:, None]).to(tl.int64) * T + t) * D + d[None, :]
    mask = (heads[:, None] < H // G) & (d[None, :] < D // 2)
    tl.store(to, half(q_a), mask)
    tl.store(to + D // 2, half(q_b), mask)
    k_a, k_b = rotated(row + (H + g) * D, one, one < 1, k_norm_ptr, cos_ptr, sin_ptr, start + t, D, eps, NORM, D2P)
    at = ((sequence * G + g).to(tl.int64) * S + start + t) * D + d
    tl.store(k_cache_ptr + at[None, :], half(k_a), d[None, :] < D // 2)
    tl.store(k_cache_ptr + at[None, :] + D // 2, half(k_b), d[None, :] < D // 2)
    v = row + (H + G + g) * D + d
    tl.store(v_cache_ptr + at, half(tl.load(v, d < D // 2, other=0)), d < D // 2)
    tl.store(v_cache_ptr + at + D // 2, half(tl.load(v + D // 2, d < D // 2, other=0)), d < D // 2)


@triton.jit
def attend_kernel(qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, length_ptr, y_ptr,
                  most_ptr, total_ptr, H, G, D, S, scale, eps, NORM: tl.constexpr, HGP: tl.constexpr,
                  D2P: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
                  PDL: tl.constexpr):
    """Attention of one new token a sequence, which is also put into the cache, behind the `length` tokens there.

    A program reads SPLIT positions for one group of heads: y (B, H, SPLITS, D) sums of values weighted by
    exp(score - most), most and total (B, H, SPLITS); with one split y (B, H, D) is the result. Scores and values are
    summed in fp32; queries and weights are rounded to fp16, as keys and values are. Softmax as in arXiv 1805.02867.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sequence, g, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    length = tl.load(length_ptr)
    if split * SPLIT > length:
        return
    row = qkv_ptr + sequence.to(tl.int64) * (H + 2 * G) * D
    heads, one = tl.arange(0, HGP), tl.arange(0, 1)
    d, dv, s = tl.arange(0, D2P), tl.arange(0, DP), tl.arange(0, BS)
    D2 = D // 2
    q_a, q_b = rotated(row + g * (H // G) * D, heads, heads < H // G, q_norm_ptr, cos_ptr, sin_ptr, length, D, eps,
                       NORM, D2P)
    q_a, q_b = half(q_a), half(q_b)
    cached = (sequence * G + g).to(tl.int64) * S * D
    keys, values = k_cache_ptr + cached, v_cache_ptr + cached
    most = tl.full((HGP,), float("-inf"), tl.float32)
    total = tl.zeros((HGP,), tl.float32)
    acc = tl.zeros((HGP, DP), tl.float32)
    if length < (split + 1) * SPLIT:  # the new token belongs here
        k_a, k_b = rotated(row + (H + g) * D, one, one < 1, k_norm_ptr, cos_ptr, sin_ptr, length, D, eps, NORM, D2P)
        k_a, k_b = half(k_a), half(k_b)
        v = half(tl.load(row + (H + G + g) * D + dv, dv < D, other=0))
        to = keys + length * D + d[None, :]
        tl.store(to, k_a, d[None, :] < D2)
        tl.store(to + D2, k_b, d[None, :] < D2)
        tl.store(values + length * D + dv, v, dv < D)
        most = scale * (tl.sum(q_a.to(tl.float32) * k_a.to(tl.float32), 1)
                        + tl.sum(q_b.to(tl.float32) * k_b.to(tl.float32), 1))
        total += 1.0
        acc += v.to(tl.float32)[None, :]
    end = tl.minimum((split + 1) * SPLIT, length)
    for at in tl.range(split * SPLIT, end, BS):
        position = at + s
        there = position < end
        mask = (d[:, None] < D2) & there[None, :]
        key = keys + position[None, :] * D + d[:, None]
        scores = tl.dot(q_a, tl.load(key, mask, other=0))
        scores = tl.dot(q_b, tl.load(key + D2, mask, other=0), scores) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        kept = tl.exp(most - now)
        weights = tl.exp(scores - now[:, None])
        v = tl.load(values + position[:, None] * D + dv[None, :], there[:, None] & (dv[None, :] < D), other=0)
        acc = tl.dot(weights.to(tl.float16), v, acc * kept[:, None])
        total = total * kept + tl.sum(weights, 1)
        most = now
    head = sequence * H + g * (H // G) + heads
    inside = heads < H // G
    if SPLITS == 1:
        acc = acc / total[:, None]
    else:
        tl.store(most_ptr + head * SPLITS + split, most, inside)
        tl.store(total_ptr + head * SPLITS + split, total, inside)
    to = y_ptr + (head[:, None].to(tl.int64) * SPLITS + split) * D + dv[None, :]
    tl.store(to, acc, inside[:, None] & (dv[None, :] < D))


@triton.jit
def combine_kernel(part_ptr, most_ptr, total_ptr, length_ptr, y_ptr, D, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
                   DP: tl.constexpr, PDL: tl.constexpr):
    """y (B, H, D) from the splits of attend_kernel, 16 at a time. A program a head."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    s, d = tl.arange(0, 16), tl.arange(0, DP)
    used = tl.load(length_ptr) // SPLIT + 1
    most = tl.load(most_ptr + head * SPLITS)
    total = tl.load(total_ptr + head * SPLITS) * 0
    acc = tl.zeros((DP,), tl.float32)
    for at in tl.range(0, used, 16):
        split = head.to(tl.int64) * SPLITS + at + s
        there = at + s < used
        parts_most = tl.load(most_ptr + split, there, other=float("-inf"))
        now = tl.maximum(most, tl.max(parts_most, 0))
        before, kept = tl.exp(most - now), tl.exp(parts_most - now)
        total = total * before + tl.sum(tl.load(total_ptr + split, there, other=0) * kept, 0)
        part = tl.load(part_ptr + split[:, None] * D + d[None, :], there[:, None] & (d[None, :] < D), other=0)
        acc = acc * before + tl.sum(part * kept[:, None], 0)
        most = now
    tl.store(y_ptr + head.to(tl.int64) * D + d, acc / total, d < D)
