/* The product of int8 activations and trits in training: exact in int32, then values times the weights' scale. */
#pragma once
#include "../gpt/values.h"

/* Packed trits: [N / 16][K / 4][16][4], K padded with zeros to 64, so that 64 columns of 16 rows are a tile of AMX and 4
 * columns a line for `vpdpbusd`, which wants one side unsigned: there codes are trits + 1, and sum(x) is taken off. */
#if defined(__AMX_INT8__)
#define TRIT_OFFSET 0
#else
#define TRIT_OFFSET 1
#endif

/* w_trit = round(w * inverse) clamped to -1 ... 1, of w (rows, K), into the panels from row `first` (a multiple of 16). */
void fused_ternarize(int64_t rows, int K, const float *w, float inverse, int8_t *packed) {
    int Kp = up64(K);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < (rows + 15) / 16; panel++)
        for (int k = 0; k < Kp; k += 16)
            for (int r = 0; r < 16; r++) {
                v16 v = {0};
                if (k < K && 16 * panel + r < rows) v = load(w + (16 * panel + r) * K + k) * inverse;
                v = max16(min16(v, all(1.0f)), all(-1.0f)); /* clamped before it is rounded: the same trits */
                b16 t = __builtin_convertvector(__builtin_convertvector(round16(v), i16), b16) + TRIT_OFFSET;
                int8_t *to = packed + (panel * Kp + k) * 16 + 4 * r;
                for (int j = 0; j < 4; j++) memcpy(to + 64 * j, (int8_t *)&t + 4 * j, 4);
            }
}

/* Packed trits -> values (N, K) */
void fused_unpack_trits(int bf16, int64_t N, int K, const int8_t *packed, void *to) {
    int Kp = up64(K);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int k = 0; k < K; k += 16) {
            b16 t;
            for (int j = 0; j < 4; j++) memcpy((int8_t *)&t + 4 * j, packed + (n / 16 * Kp + k) * 16 + 64 * j + n % 16 * 4, 4);
            put(TO(to, n * K + k), tofloat(__builtin_convertvector((b16)(t - TRIT_OFFSET), i16)), bf16);
        }
}

#if ISA_AVX512
/* 16 sums as values: times their columns. */
ALWAYS void finish(const int bf16, i16 acc, const float *columns, char *y) { put(y, tofloat(acc) * load(columns), bf16); }
#endif

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
/* The system lends the tile registers to a process that asks. 0 where it does not: then torch multiplies. */
int fused_has_product(void) { return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }

typedef struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles;

/* 32 tokens times 32 columns: four tiles of sums, two of tokens, two of trits. */
ALWAYS void block(const int bf16, int tokens, int N, int n, int Kp, const int8_t *x, const int8_t *w0, const int8_t *w1,
                  const float *columns, char *y) {
    _Alignas(64) int32_t acc[4][16][16];
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int k = 0; k < Kp; k += 64) {
        _tile_loadd(6, w0 + 16 * k, 64);
        _tile_loadd(7, w1 + 16 * k, 64);
        _tile_loadd(4, x + k, Kp);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, x + 16 * Kp + k, Kp);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, acc[0], 64); _tile_stored(1, acc[1], 64); _tile_stored(2, acc[2], 64); _tile_stored(3, acc[3], 64);
    for (int t = 0; t < tokens; t++)
        for (int half = 0; half < 2 && n + 16 * half < N; half++)
            finish(bf16, loadi(acc[2 * (t / 16) + half][t % 16]), columns + n + 16 * half, y + (bf16 ? 2 : 4) * ((int64_t)t * N + n + 16 * half));
}

/* y (M, N) values = (x (M, Kp) @ trits.T) * columns; x has 31 rows more than M to be read, N is a multiple of 16. */
void fused_ternary_product(int bf16, int64_t M, int N, int K, const int8_t *x, const int8_t *packed, const float *columns, void *y) {
    int Kp = up64(K), group = (int64_t)N * Kp > 1 << 20 ? 64 : 32; /* tokens that use trits which come from beyond L2 */
#pragma omp parallel
    {
        tiles mine = {.palette = 1}, before;
        for (int i = 0; i < 8; i++) mine.bytes[i] = 64, mine.rows[i] = 16;
        _tile_storeconfig(&before);
        _tile_loadconfig(&mine);
#pragma omp for schedule(static)
        for (int64_t m0 = 0; m0 < M; m0 += group)
            for (int n = 0; n < N; n += 32)
                for (int64_t m = m0; m < m0 + group && m < M; m += 32) {
                    const int8_t *w0 = packed + (int64_t)n * Kp, *w1 = n + 16 < N ? w0 + 16 * Kp : w0;
                    int tokens = M - m < 32 ? (int)(M - m) : 32;
                    if (bf16) block(1, tokens, N, n, Kp, x + m * Kp, w0, w1, columns, TO(y, m * N));
                    else block(0, tokens, N, n, Kp, x + m * Kp, w0, w1, columns, TO(y, m * N));
                }
        if (before.palette) _tile_loadconfig(&before); /* torch may count on its own */
        else _tile_release();
    }
}

#elif ISA_AVX512
int fused_has_product(void) { return 1; }

/* T tokens times 32 columns, every sum in a register; sums (T) of x are taken off. */
ALWAYS void block(const int T, const int bf16, int N, int n, int Kp, const int8_t *x, const int8_t *w0, const int8_t *w1,
                  const int32_t *sums, const float *columns, char *y) {
    i16 acc[T][2];
#pragma GCC unroll 14
    for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = alli(-sums[t]);
    for (int k = 0; k < Kp; k += 4) {
        __m512i a = _mm512_loadu_si512(w0 + 16 * k), b = _mm512_loadu_si512(w1 + 16 * k);
#pragma GCC unroll 14
        for (int t = 0; t < T; t++) {
            int32_t four;
            memcpy(&four, x + (int64_t)t * Kp + k, 4);
            acc[t][0] = (i16)_mm512_dpbusd_epi32((__m512i)acc[t][0], a, _mm512_set1_epi32(four));
            acc[t][1] = (i16)_mm512_dpbusd_epi32((__m512i)acc[t][1], b, _mm512_set1_epi32(four));
        }
    }
#pragma GCC unroll 14
    for (int t = 0; t < T; t++)
        for (int half = 0; half < 2 && n + 16 * half < N; half++)
            finish(bf16, acc[t][half], columns + n + 16 * half, y + (bf16 ? 2 : 4) * ((int64_t)t * N + n + 16 * half));
}

void fused_ternary_product(int bf16, int64_t M, int N, int K, const int8_t *x, const int8_t *packed, const float *columns, void *y) {
    int Kp = up64(K);
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < (M + 13) / 14; m++) { /* the last tile reads rows beyond M and does not keep them */
        int tokens = M - 14 * m < 14 ? (int)(M - 14 * m) : 14;
        const int8_t *from = x + 14 * m * Kp;
        int32_t sums[14] = {0};
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < Kp; k += 16) {
                b16 b;
                memcpy(&b, from + (int64_t)t * Kp + k, 16);
                sums[t] += sum_ofi(__builtin_convertvector(b, i16));
            }
        for (int n = 0; n < N; n += 32) {
            const int8_t *w0 = packed + (int64_t)n * Kp, *w1 = n + 16 < N ? w0 + 16 * Kp : w0;
#define CASE(t) case t: if (bf16) block(t, 1, N, n, Kp, from, w0, w1, sums, columns, TO(y, 14 * m * N)); \
                        else block(t, 0, N, n, Kp, from, w0, w1, sums, columns, TO(y, 14 * m * N)); break;
            switch (tokens) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
                              CASE(12) CASE(13) CASE(14) }
#undef CASE
        }
    }
}
#else
int fused_has_product(void) { return 0; }
void fused_ternary_product(int bf16, int64_t M, int N, int K, const int8_t *x, const int8_t *packed, const float *columns, void *y) {
    (void)bf16, (void)M, (void)N, (void)K, (void)x, (void)packed, (void)columns, (void)y;
}
#endif
