/* The product that all others are made of: a few rows times two panels, its sums in registers, or in tiles of AMX. How
 * many rows and columns those hold, and what of both sides stays in the caches meanwhile, depends on the CPU. */
#pragma once
#include "../kernels/amx.h"
#include "values.h"

/* HIGH: rows that are multiplied at once, ROWS and COLUMNS of them with their sums in registers; WORDS: as
 * many are summed at a time, so that rows and panels of them are in L1; GROUP: rows that take all panels in
 * turn, where those stay in L2. */
#if ISA_AMX
enum { HIGH = 32, ROWS = 8, COLUMNS = 32, GROUP = HIGH, WORDS = 192, PANELS_IN_L2 = 1700 << 10 };
#elif LANES == 16
enum { HIGH = 14, ROWS = 14, COLUMNS = 32, GROUP = HIGH, WORDS = 192, PANELS_IN_L2 = 1700 << 10 };
#elif LANES == 8
enum { HIGH = 24, ROWS = 6, COLUMNS = 16, GROUP = 2 * HIGH, WORDS = 256, PANELS_IN_L2 = 384 << 10 };
#else
enum { HIGH = 24, ROWS = 2, COLUMNS = 16, GROUP = 2 * HIGH, WORDS = 128, PANELS_IN_L2 = 384 << 10 };
#endif
enum { ACROSS = COLUMNS / LANES };

/* Instructions that multiply bytes want one side unsigned: there codes are trits + 1, and the sum
 * of the row is taken off. */
#if defined(__AVX2__) && !ISA_AMX
#define TRIT_OFFSET 1
#else
#define TRIT_OFFSET 0
#endif
/* And where none adds up four products in 32 bits, pairs of them are summed in 16, which have room for 64 words:
 * 2 * 2 * -128 each. */
#if !ISA_AMX && !ISA_AVX512 && !defined(__AVXVNNI__)
#define PARTIAL 1
#else
#define PARTIAL 0
#endif
#define DEEP(kind) (PARTIAL && (kind) == INT8 ? 64 : WORDS)

int fused_ready(void) { return !ISA_AMX || ask_for_tiles(); }

#if ISA_AMX
ALWAYS void multiply_tile(const int kind, int words, const char *x, int64_t stride, const char *w0, const char *w1,
                          int more, char *acc, int64_t away) {
    if (more) {
        _tile_loadd(0, acc, away); _tile_loadd(1, acc + 64, away);
        _tile_loadd(2, acc + 16 * away, away); _tile_loadd(3, acc + 16 * away + 64, away);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
#define TILES(dot) \
    for (int k = 0; k < 4 * words; k += 64) { \
        _tile_loadd(6, w0 + 16 * k, 64); \
        _tile_loadd(7, w1 + 16 * k, 64); \
        _tile_loadd(4, x + k, stride); \
        dot(0, 4, 6); \
        dot(1, 4, 7); \
        _tile_loadd(5, x + 16 * stride + k, stride); \
        dot(2, 5, 6); \
        dot(3, 5, 7); \
    }
    if (kind == INT8) TILES(_tile_dpbssd)
    else TILES(_tile_dpbf16ps)
#undef TILES
    _tile_stored(0, acc, away); _tile_stored(1, acc + 64, away);
    _tile_stored(2, acc + 16 * away, away); _tile_stored(3, acc + 16 * away + 64, away);
}
#endif

#if PARTIAL
/* acc + x . w: of each word two sums of two products, in 16 bits; and those as whole ones */
ALWAYS vi add_bytes(vi acc, vi x, vi w) {
#if defined(__AVX2__)
    acc = (vi)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
    __asm__("" : "+x"(acc)); /* GCC would make all products before it adds any, and has no registers for them */
    return acc;
#else
    wide_bytes a = (wide_bytes)x, b = (wide_bytes)w;
    return (vi)((wide_bytes)acc + (a << 8 >> 8) * (b << 8 >> 8) + (a >> 8) * (b >> 8));
#endif
}
ALWAYS vi total(vi acc) { return (acc << 16 >> 16) + (acc >> 16); }
#else
ALWAYS vi add_bytes(vi acc, vi x, vi w) {
#if ISA_AVX512
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#endif
}
ALWAYS vi total(vi acc) { return acc; }
#endif

/* acc + x . w, word by word. Where no instruction does that for two bf16, they are widened, the low and then the high
 * ones; by narrow registers, of which there are few, in two rounds over all sums: a `half` each. */
#if LANES < 16
enum { HALVES = 2 };
#else
enum { HALVES = 1 };
#endif
ALWAYS vi widened(const int half, vi x) { return half ? x & splati((int32_t)0xffff0000) : x << 16; }
ALWAYS vi dot(const int kind, vi acc, vi x, vi w) {
    if (kind == INT8) return add_bytes(acc, x, w);
#if ISA_AVX512 && defined(__AVX512BF16__)
    if (kind == BF16) return (vi)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
#elif LANES == 16
    if (kind == BF16)
        acc = (vi)fmav((vf)widened(0, x), (vf)widened(0, w), (vf)acc), x = widened(1, x), w = widened(1, w);
#endif
    return (vi)fmav((vf)x, (vf)w, (vf)acc);
}

/* sums + rows of a word each (`stride` bytes apart) times as many columns */
ALWAYS void add_words(const int kind, const int half, const char *x, int64_t stride, const char *w0, const char *w1,
                      vi sums[ROWS][ACROSS]) {
    const int halved = kind == BF16 && HALVES == 2;
    vi right[ACROSS];
#pragma GCC unroll 4
    for (int i = 0; i < ACROSS; i++) {
        right[i] = loadi((i * LANES < 16 ? w0 : w1) + 4 * (LANES * i % 16));
        if (halved) right[i] = widened(half, right[i]);
    }
#pragma GCC unroll 14
    for (int t = 0; t < ROWS; t++) {
        int32_t word;
        memcpy(&word, x + t * stride, 4);
        vi left = halved ? widened(half, splati(word)) : splati(word);
#pragma GCC unroll 4
        for (int i = 0; i < ACROSS; i++) sums[t][i] = dot(kind, sums[t][i], left, right[i]);
    }
}

ALWAYS void multiply_in_registers(const int kind, int rows, int words, const char *x, int64_t stride, const char *w0,
                                  const char *w1, int more, char *acc, int64_t away) {
    const int late = PARTIAL && kind == INT8; /* what there was is added in the end */
    for (int first = 0; first < rows; first += ROWS)
        for (int column = 0; column < (COLUMNS == 16 && w0 == w1 ? 16 : 32); column += COLUMNS) {
            const char *w = column < 16 ? w0 : w1;
            vi sums[ROWS][ACROSS];
#pragma GCC unroll 14
            for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 4
                for (int i = 0; i < ACROSS; i++)
                    sums[t][i] = more && !late ? loadi(acc + (first + t) * away + 4 * (column + LANES * i)) : (vi){0};
            for (int k = 0; k < 4 * words; k += 4) {
                const char *left = x + first * stride + k;
                add_words(kind, 0, left, stride, w + 16 * k, w1 + 16 * k, sums);
                if (kind == BF16 && HALVES == 2) add_words(kind, 1, left, stride, w + 16 * k, w1 + 16 * k, sums);
            }
#pragma GCC unroll 14
            for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 4
                for (int i = 0; i < ACROSS; i++) {
                    char *to = acc + (first + t) * away + 4 * (column + LANES * i);
                    if (late) sums[t][i] = total(sums[t][i]) + (more ? loadi(to) : (vi){0});
                    memcpy(to, &sums[t][i], sizeof(vi));
                }
        }
}

/* compiled once a kind: wherever it is inlined, the compiler has more to do, and registers left for fewer sums */
#define KIND(name, kind) \
    static __attribute__((noinline, noclone)) void name(int rows, int words, const char *x, int64_t stride, \
                                                        const char *w0, const char *w1, int more, char *acc, \
                                                        int64_t away) { \
        multiply_in_registers(kind, rows, words, x, stride, w0, w1, more, acc, away); \
    }
KIND(multiply_floats, FLOAT)
#if !ISA_AMX
KIND(multiply_bf16, BF16)
KIND(multiply_bytes, INT8)
#endif
#undef KIND

/* acc (HIGH, 32), its rows `away` bytes from each other = x (HIGH rows, `stride` bytes apart) times two panels, or that
 * is added to it, where there is `more` to a sum. Rows behind the first `rows` are of no interest, nor is the right
 * half where both panels are the same: they are left out, as far as registers and tiles allow. */
ALWAYS void multiply(const int kind, int rows, int words, const char *x, int64_t stride, const char *w0, const char *w1,
                     int more, char *acc, int64_t away) {
    if (rows > HIGH) rows = HIGH;
#if ISA_AMX
    if (kind == FLOAT) multiply_floats(rows, words, x, stride, w0, w1, more, acc, away);
    else multiply_tile(kind, words, x, stride, w0, w1, more, acc, away);
#else
    (kind == FLOAT ? multiply_floats : kind == BF16 ? multiply_bf16 : multiply_bytes)(
        rows, words, x, stride, w0, w1, more, acc, away);
#endif
}
