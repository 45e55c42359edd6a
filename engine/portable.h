/* What AVX2, AVX-VNNI, NEON and plain C share: a line is cut into parts as wide as a register, in the compiler's own
 * vectors. The instruction set gives WIDTH and the type `bytes` of so many; how sums of four products are made, dot4; and
 * lookup, one of 64 bytes by each byte of a vector.
 * Included by kernels.h after the instruction set's own header. */
#pragma once
#include "kernels.h"

#define PARTS (64 / WIDTH)
typedef struct { bytes q[5]; } planes;

INLINE bytes part(const void *p) { bytes v; memcpy(&v, p, WIDTH); return v; }
INLINE sums four(const int8_t *x) { return load4(x) - (sums){0}; }

/* One part of a group of lines as planes of plain codes: COLS / 4 of them. */
INLINE planes codes(const int kind, const uint8_t *w) {
    bytes v = part(w);
    if (kind == Q8) return (planes){{v}};
    if (kind == Q6) { /* low four bits from lines 0-1, high two from line 2 */
        bytes v2 = part(w + 64), high = part(w + 128);
        return (planes){{(v & 15) | (high & 3) << 4, v >> 4 | (high >> 2 & 3) << 4, (v2 & 15) | (high >> 4 & 3) << 4,
                         v2 >> 4 | high >> 6 << 4}};
    }
    bytes fifth = v;
    if (kind == TRIT16) {
        bytes escaped = (bytes)(v >= 192), index = v & 63;
        fifth = (escaped & lookup(trit16_fifth, index)) | (~escaped & v);
        v = (escaped & lookup(trit16_high, index)) | (~escaped & lookup(trit16_low, index));
    }
    return (planes){{v & 3, v >> 2 & 3, v >> 4 & 3, v >> 6, fifth >> 6}};
}

INLINE void expand_kind(const int kind, const uint8_t *w, int groups, uint8_t *e) {
    for (int i = 0; i < groups; i++, w += BYTES[kind], e += COLS[kind] / 4 * GEMM_PANELS * 64)
        for (int h = 0; h < PARTS; h++) {
            planes s = codes(kind, w + WIDTH * h);
#pragma GCC unroll 5
            for (int p = 0; p < COLS[kind] / 4; p++) memcpy(e + p * GEMM_PANELS * 64 + WIDTH * h, &s.q[p], WIDTH);
        }
}

INLINE void dot_tokens(const int kind, const int T, const uint8_t *const *w, int groups, int many, const int8_t *x,
                       int32_t *acc) {
    const int P = COLS[kind] / 4;
    sums sum[2][PARTS][FEW];
    for (int b = 0; b < 2; b++) for (int h = 0; h < PARTS; h++) for (int t = 0; t < T; t++) sum[b][h][t] = (sums){0};
    for (int i = 0; i < groups; i++, x += 4 * P * T)
#pragma GCC unroll 2
        for (int b = 0; b < 2; b++) {
            const uint8_t *line = w[b] + (size_t)i * (size_t)BYTES[kind];
            for (int at = 0; at < BYTES[kind]; at += 64) ahead(line + at, many);
#pragma GCC unroll 4
            for (int h = 0; h < PARTS; h++) {
                planes s = codes(kind, line + WIDTH * h);
#pragma GCC unroll 5
                for (int p = 0; p < P; p++)
#pragma GCC unroll 2
                    for (int t = 0; t < T; t++) sum[b][h][t] = dot4(kind, sum[b][h][t], s.q[p], four(x + 4 * (p * T + t)));
            }
        }
    for (int t = 0; t < T; t++)
        for (int b = 0; b < 2; b++)
            for (int h = 0; h < PARTS; h++) memcpy(acc + ROWS * (2 * t + b) + WIDTH / 4 * h, &sum[b][h][t], WIDTH);
}

static void dot(int kind, int T, const uint8_t *const *w, int groups, int many, const int8_t *x, int32_t *acc) {
#define CASE(kind, n) case 2 * kind + n - 1: dot_tokens(kind, n, w, groups, many, x, acc); break;
    switch (2 * kind + T - 1) {
        CASE(TRIT2, 1) CASE(TRIT2, 2) CASE(TRIT16, 1) CASE(TRIT16, 2) CASE(Q8, 1) CASE(Q8, 2) CASE(Q6, 1) CASE(Q6, 2) }
#undef CASE
}

INLINE void gemm_tokens(const int kind, const int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
    sums sum[GEMM_TOKENS][PARTS];
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) for (int h = 0; h < PARTS; h++) memcpy(&sum[t][h], acc + 32 * t + WIDTH / 4 * h, WIDTH);
    for (int k = 0; k < k4; k++, e += 64, x += 4 * T)
#pragma GCC unroll 6
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int h = 0; h < PARTS; h++) sum[t][h] = dot4(kind, sum[t][h], part(e + WIDTH * h), four(x + 4 * t));
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) for (int h = 0; h < PARTS; h++) memcpy(acc + 32 * t + WIDTH / 4 * h, &sum[t][h], WIDTH);
}

static void gemm(int kind, int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
#define CASE(n) case n: if (kind == Q8) gemm_tokens(Q8, n, e, x, k4, acc); else gemm_tokens(Q6, n, e, x, k4, acc); break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4)
#if GEMM_TOKENS == 6
                 CASE(5) CASE(6)
#endif
    }
#undef CASE
}
