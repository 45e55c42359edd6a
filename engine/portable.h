/* What AVX2 and plain C share: panels are expanded to plain codes a piece at a time, and multiplied from the L1 cache.
 * Included by kernels.h after the instruction set's own header. */
#pragma once
#include "kernels.h"

/* A group of lines as plain codes e[COLS / 4][GEMM_PANELS][64]. */
INLINE void expand_kind(const int kind, const uint8_t *w, int groups, uint8_t *e) {
    for (int i = 0; i < groups; i++, w += BYTES[kind], e += COLS[kind] / 4 * GEMM_PANELS * 64)
        for (int b = 0; b < 64; b++) {
            uint8_t *to = e + b, v = w[b];
            const int step = GEMM_PANELS * 64;
            if (kind == Q8) {
                to[0] = v;
            } else if (kind == Q6) {
                uint8_t v2 = w[64 + b], high = w[128 + b];
                to[0] = (uint8_t)((v & 15) | (high & 3) << 4);
                to[step] = (uint8_t)((v >> 4) | (high >> 2 & 3) << 4);
                to[2 * step] = (uint8_t)((v2 & 15) | (high >> 4 & 3) << 4);
                to[3 * step] = (uint8_t)((v2 >> 4) | (high >> 6) << 4);
            } else {
                if (kind == TRIT16) {
                    int escaped = v >= 192;
                    to[4 * step] = (uint8_t)((escaped ? trit16_fifth[v & 63] : v) >> 6);
                    v = escaped ? trit16_high[v & 63] : trit16_low[v & 63];
                }
                for (int p = 0; p < 4; p++) to[p * step] = v >> (2 * p) & 3;
            }
        }
}

static void gemm(int kind, int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
#define CASE(n) case n: if (kind == Q8) gemm_kind(Q8, n, e, x, k4, acc); else gemm_kind(Q6, n, e, x, k4, acc); break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
}

static void dot(int kind, int T, const uint8_t *const *w, int groups, const int8_t *x, int32_t *acc) {
#if ISA_AVX2
    if (kind == TRIT2 && T == 1) {
        dot1_trit2(w[0], groups, x, acc);
        dot1_trit2(w[1], groups, x, acc + ROWS);
        return;
    }
#endif
    uint8_t e[80 * ROWS * 4];
    const int piece = 320 / COLS[kind]; /* 320 columns: a multiple of every group */
    memset(acc, 0, sizeof(int32_t) * 2 * ROWS * (size_t)T);
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < groups; i += piece) {
            int n = groups - i < piece ? groups - i : piece, k4 = n * COLS[kind] / 4;
            expand(kind, w[h] + (size_t)i * BYTES[kind], n, e);
            gemm(kind, T, e, x + (size_t)i * COLS[kind] * T, k4, acc + ROWS * h);
        }
}
