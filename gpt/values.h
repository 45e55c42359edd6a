/* "Values": bf16 or fp32, 16 at a time, and 32 x 32 of them turned. Neighbours: fused.c, which says what for. */
#pragma once
#include <stdlib.h>
#include "../engine/floats.h"

#define AT(p, i) ((const char *)(p) + (size_t)(i) * (bf16 ? 2 : 4))
#define TO(p, i) ((char *)(p) + (size_t)(i) * (bf16 ? 2 : 4))

typedef uint16_t h16 __attribute__((vector_size(32)));

ALWAYS v16 get(const char *p, const int bf16) {
    if (!bf16) return load((const float *)(const void *)p);
    h16 h;
    memcpy(&h, p, 32);
    return (v16)(__builtin_convertvector(h, u16) << 16);
}

ALWAYS void put(char *p, v16 v, const int bf16) {
    if (!bf16) { store((float *)(void *)p, v); return; }
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else /* to the nearest, halves to even; what is not a number stays none */
    u16 bits = (u16)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    h16 h = __builtin_convertvector((u16)choose((i16)(v == v), (v16)rounded, (v16)(alli(0x7fc0))), h16);
#endif
    memcpy(p, &h, 32);
}

ALWAYS int up64(int n) { return (n + 63) / 64 * 64; }

ALWAYS i16 lanes(void) { return (i16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

/* 32 x 32 bf16 in place: at distance d, blocks off the diagonal change places. */
typedef uint16_t h32 __attribute__((vector_size(64)));
typedef int16_t s32 __attribute__((vector_size(64)));
typedef int8_t b32 __attribute__((vector_size(32)));
ALWAYS void exchange(h32 *a, h32 *b, const int d) {
    h32 low, high;
    for (int j = 0; j < 32; j++) low[j] = (uint16_t)(j & d ? 32 + j - d : j), high[j] = (uint16_t)(j & d ? 32 + j : j + d);
    h32 first = __builtin_shuffle(*a, *b, low);
    *b = __builtin_shuffle(*a, *b, high);
    *a = first;
}
static void turn(h32 *tile) {
#define STEP(d) for (int i = 0; i < 32; i++) if (!(i & d)) exchange(tile + i, tile + i + d, d);
#pragma GCC unroll 32
    STEP(1)
#pragma GCC unroll 32
    STEP(2)
#pragma GCC unroll 32
    STEP(4)
#pragma GCC unroll 32
    STEP(8)
#pragma GCC unroll 32
    STEP(16)
#undef STEP
}

/* Rows of a block (at most BLOCK, `stride` apart), int8 or bf16, as columns of `to`, whose rows are n apart. */
static void turn_rows(int quantized, int rows, int width, int64_t stride, const void *from, int64_t n, void *to) {
    for (int c0 = 0; c0 < width; c0 += 32)
        for (int r0 = 0; r0 < rows; r0 += 32) {
            h32 tile[32];
            int wide = width - c0 < 32 ? width - c0 : 32, high = rows - r0 < 32 ? rows - r0 : 32;
            for (int r = 0; r < high; r++) {
                int64_t at = (r0 + r) * stride + c0;
                if (quantized) {
                    b32 bytes = {0};
                    memcpy(&bytes, (const int8_t *)from + at, (size_t)wide);
                    tile[r] = (h32)__builtin_convertvector(bytes, s32);
                } else {
                    memcpy(&tile[r], (const uint16_t *)from + at, 2 * (size_t)wide);
                }
            }
            turn(tile);
            for (int c = 0; c < wide; c++) {
                int64_t at = (c0 + c) * n + r0;
                b32 bytes = __builtin_convertvector((s32)tile[c], b32);
                if (quantized) memcpy((int8_t *)to + at, &bytes, (size_t)high);
                else memcpy((uint16_t *)to + at, &tile[c], 2 * (size_t)high);
            }
        }
}
