/* What AVX2, AVX-VNNI, NEON and plain C share: a line is cut into parts as wide as a register, in the compiler's own
 * vectors. The instruction set gives WIDTH and its types; how sums of four products are made, dot4; and `lookup`, one
 * of 64 bytes by each byte of a vector. AVX2 has its own
 *
 *   fields     a part of 1.6-bit bytes as 2-bit fields of four trits, and the fifth
 *   add_trits  trits' codes times activations onto `partial` sums, which have room for PARTIAL of them
 *   total      partial sums as whole ones
 *
 * Included by integers.h after the instruction set's own header. */
#pragma once
#include "integers.h"

#define PARTS (64 / WIDTH)
typedef struct { bytes q[5]; } planes;

INLINE bytes part(const void *p) { bytes v; memcpy(&v, p, WIDTH); return v; }
INLINE sums four(const int8_t *x) { return load4(x) - (sums){0}; }

#ifndef __AVX2__
INLINE bytes fields(bytes v, bytes *fifth) {
    bytes escaped = (bytes)(v >= 192), index = v & 63;
    *fifth = ((escaped & lookup(trit16_fifth, index)) | (~escaped & v)) >> 6;
    return (escaped & lookup(trit16_high, index)) | (~escaped & lookup(trit16_low, index));
}
#endif
#ifndef PARTIAL
#define PARTIAL 4096
typedef sums partial;
INLINE partial add_trits(partial sum, bytes code, sums x) { return dot4(TRIT2, sum, code, x); }
INLINE sums total(partial sum) { return sum; }
#endif

/* One part of a group of lines as planes of plain codes: COLS / 4 of them. */
INLINE planes codes(const int kind, const uint8_t *w) {
    bytes v = part(w), fifth = {0};
    if (kind == Q8) return (planes){{v}};
    if (kind == Q6) { /* low four bits from lines 0-1, high two from line 2 */
        bytes v2 = part(w + 64), high = part(w + 128);
        return (planes){{(v & 15) | (high << 4 & 48), (v >> 4 & 15) | (high << 2 & 48), (v2 & 15) | (high & 48),
                         (v2 >> 4 & 15) | (high >> 2 & 48)}};
    }
    if (kind == TRIT16) v = fields(v, &fifth);
    return (planes){{v & 3, v >> 2 & 3, v >> 4 & 3, v >> 6 & 3, fifth}};
}

INLINE void expand_kind(const int kind, const uint8_t *w, int groups, uint8_t *e) {
    for (int i = 0; i < groups; i++, w += BYTES[kind], e += COLS[kind] / 4 * GEMM_PANELS * 64)
        for (int h = 0; h < PARTS; h++) {
            planes s = codes(kind, w + WIDTH * h);
#pragma GCC unroll 5
            for (int p = 0; p < COLS[kind] / 4; p++) memcpy(e + p * GEMM_PANELS * 64 + WIDTH * h, &s.q[p], WIDTH);
        }
}

/* Two panels of trits times T tokens, PARTIAL / 8 groups of one and then of the other. Planes 1 and 3 stay where they
 * stand in half a byte, 4 times their codes: five operations make four planes of a part. */
INLINE void dot_trits(const int kind, const int T, const uint8_t *const *w, int groups, enum prefetch how,
                      const int8_t *x, int32_t *acc) {
    const int P = COLS[kind] / 4;
    memset(acc, 0, sizeof(int32_t) * 2 * ROWS * (size_t)T);
    for (int from = 0; from < groups; from += PARTIAL / 8) {
        const int n = groups - from < PARTIAL / 8 ? groups - from : PARTIAL / 8;
        for (int b = 0; b < 2; b++) {
            const uint8_t *line = w[b] + 64 * (size_t)from;
            const int8_t *at = x + 4 * P * T * (size_t)from;
            partial one[PARTS][FEW], fours[PARTS][FEW];
            for (int h = 0; h < PARTS; h++) for (int t = 0; t < T; t++) one[h][t] = fours[h][t] = (partial){0};
            for (int i = 0; i < n; i++, line += 64, at += 4 * P * T) {
                prefetch(line, how);
#pragma GCC unroll 4
                for (int h = 0; h < PARTS; h++) {
                    bytes fifth = {0}, v = part(line + WIDTH * h);
                    if (kind == TRIT16) v = fields(v, &fifth);
                    bytes high = (bytes)((halves)v >> 4);
#pragma GCC unroll 2
                    for (int t = 0; t < T; t++) {
                        one[h][t] = add_trits(one[h][t], v & 3, four(at + 4 * t));
                        fours[h][t] = add_trits(fours[h][t], v & 12, four(at + 4 * (T + t)));
                        one[h][t] = add_trits(one[h][t], high & 3, four(at + 4 * (2 * T + t)));
                        fours[h][t] = add_trits(fours[h][t], high & 12, four(at + 4 * (3 * T + t)));
                        if (P == 5) one[h][t] = add_trits(one[h][t], fifth, four(at + 4 * (4 * T + t)));
                    }
                }
            }
            for (int t = 0; t < T; t++)
                for (int h = 0; h < PARTS; h++) {
                    int32_t *to = acc + ROWS * (2 * t + b) + WIDTH / 4 * h;
                    sums sum;
                    memcpy(&sum, to, WIDTH);
                    sum += total(one[h][t]) + (total(fours[h][t]) >> 2);
                    memcpy(to, &sum, WIDTH);
                }
        }
    }
}

/* Two panels of bytes or six bits times T tokens. */
INLINE void dot_tokens(const int kind, const int T, const uint8_t *const *w, int groups, enum prefetch how,
                       const int8_t *x, int32_t *acc) {
    const int P = COLS[kind] / 4;
    sums sum[2][PARTS][FEW];
    for (int b = 0; b < 2; b++) for (int h = 0; h < PARTS; h++) for (int t = 0; t < T; t++) sum[b][h][t] = (sums){0};
    for (int i = 0; i < groups; i++, x += 4 * P * T)
#pragma GCC unroll 2
        for (int b = 0; b < 2; b++) {
            const uint8_t *line = w[b] + (size_t)i * (size_t)BYTES[kind];
            for (int at = 0; at < BYTES[kind]; at += 64) prefetch(line + at, how);
#pragma GCC unroll 4
            for (int h = 0; h < PARTS; h++) {
                planes s = codes(kind, line + WIDTH * h);
#pragma GCC unroll 5
                for (int p = 0; p < P; p++)
#pragma GCC unroll 2
                    for (int t = 0; t < T; t++)
                        sum[b][h][t] = dot4(kind, sum[b][h][t], s.q[p], four(x + 4 * (p * T + t)));
            }
        }
    for (int t = 0; t < T; t++)
        for (int b = 0; b < 2; b++)
            for (int h = 0; h < PARTS; h++) memcpy(acc + ROWS * (2 * t + b) + WIDTH / 4 * h, &sum[b][h][t], WIDTH);
}

static void dot(int kind, int T, const uint8_t *const *w, int groups, enum prefetch how, const int8_t *x,
                int32_t *acc) {
#define CASE(name, kind, n) case 2 * kind + n - 1: dot_##name(kind, n, w, groups, how, x, acc); break;
    switch (2 * kind + T - 1) {
        CASE(trits, TRIT2, 1) CASE(trits, TRIT2, 2) CASE(trits, TRIT16, 1) CASE(trits, TRIT16, 2)
        CASE(tokens, Q8, 1) CASE(tokens, Q8, 2) CASE(tokens, Q6, 1) CASE(tokens, Q6, 2) }
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

/* The same for trits, by way of partial sums. */
INLINE void gemm_trits(const int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
    for (int k = 0; k < k4;) {
        partial sum[GEMM_TOKENS][PARTS];
#pragma GCC unroll 6
        for (int t = 0; t < T; t++) for (int h = 0; h < PARTS; h++) sum[t][h] = (partial){0};
        for (int end = k4 - k < PARTIAL ? k4 : k + PARTIAL; k < end; k++, e += 64, x += 4 * T)
#pragma GCC unroll 6
            for (int t = 0; t < T; t++)
#pragma GCC unroll 4
                for (int h = 0; h < PARTS; h++) sum[t][h] = add_trits(sum[t][h], part(e + WIDTH * h), four(x + 4 * t));
#pragma GCC unroll 6
        for (int t = 0; t < T; t++)
            for (int h = 0; h < PARTS; h++) {
                sums old;
                memcpy(&old, acc + 32 * t + WIDTH / 4 * h, WIDTH);
                old += total(sum[t][h]);
                memcpy(acc + 32 * t + WIDTH / 4 * h, &old, WIDTH);
            }
    }
}

static void gemm(int kind, int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
#define CASE(n) case n: \
        if (kind == Q8) gemm_tokens(Q8, n, e, x, k4, acc); \
        else if (kind == Q6) gemm_tokens(Q6, n, e, x, k4, acc); \
        else gemm_trits(n, e, x, k4, acc); \
        break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4)
#if GEMM_TOKENS == 6
                 CASE(5) CASE(6)
#endif
    }
#undef CASE
}
