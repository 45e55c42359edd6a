/* What the kernels of training compute with, a register at a time: "values" (bf16 or fp32), and the words of 4 bytes
 * that products are made of. Neighbours: fused.c, which says what for. */
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "../kernels/floats.h"

#define AT(p, i) ((const char *)(p) + (size_t)(i) * (bf16 ? 2 : 4))
#define TO(p, i) ((char *)(p) + (size_t)(i) * (bf16 ? 2 : 4))

/* Memory of a thread, for `free`. Without any the program ends: in the middle of a parallel region nobody can be told,
 * and what training has saved is whole. */
static void *buffer_of(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes)) {
        fputs("error: not enough memory for a step. Make the model or the batch smaller.\n", stderr);
        _exit(2);
    }
    return p;
}

static void *zeros_of(size_t bytes) { return memset(buffer_of(bytes), 0, bytes); }

/* 16 lanes, register by register */
#if LANES == 16
#define EACH_WAY(u) for (int u = 0; u < WAYS; u++)
#else
#define EACH_WAY(u) _Pragma("GCC unroll 4") for (int u = 0; u < WAYS; u++)
#endif

typedef uint16_t vs __attribute__((vector_size(2 * LANES)));

/* Conversions that GCC 12 makes of many instructions. */
#if LANES == 16
ALWAYS vu widen(vs h) { return (vu)_mm512_cvtepu16_epi32((__m256i)h); }
ALWAYS vs narrow(vu x) { return __builtin_convertvector(x, vs); }
ALWAYS vi widen_bytes(vb b) { return (vi)_mm512_cvtepi8_epi32((__m128i)b); }
#elif LANES == 8
ALWAYS vu widen(vs h) { return (vu)_mm256_cvtepu16_epi32((__m128i)h); }
ALWAYS vs narrow(vu x) {
    return (vs)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
ALWAYS vi widen_bytes(vb b) { return (vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)b)); }
#else
ALWAYS vu widen(vs h) { return __builtin_convertvector(h, vu); }
ALWAYS vs narrow(vu x) { return __builtin_convertvector(x, vs); }
ALWAYS vi widen_bytes(vb b) { return __builtin_convertvector(b, vi); }
#endif

ALWAYS vf get(const char *p, const int bf16) {
    if (!bf16) return load((const float *)(const void *)p);
    vs h;
    memcpy(&h, p, sizeof h);
    return (vf)(widen(h) << 16);
}

ALWAYS void put(char *p, vf v, const int bf16) {
    if (!bf16) { store((float *)(void *)p, v); return; }
#if defined(__AVX512BF16__) && LANES == 16
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else /* to the nearest, halves to even; what is not a number stays none */
    vu bits = (vu)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vs h = narrow((vu)blend((vi)(v == v), (vf)rounded, (vf)(splati(0x7fc0))));
#endif
    memcpy(p, &h, sizeof h);
}

ALWAYS void put_two(char *p, vf a, vf b) { /* bf16 */
#if defined(__AVX512BF16__) && LANES == 16
    __m512bh h = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    memcpy(p, &h, 64);
#else
    put(p, a, 1), put(p + 2 * LANES, b, 1);
#endif
}

/* A word holds 1 << kind elements. Rows that are multiplied have whole lines of 16 words, zeros behind their end, and
 * are an odd number of lines apart: rows that are a power of two apart push each other out of the caches. */
enum kind { FLOAT, BF16, INT8 };
ALWAYS int words_of(const int kind, int64_t n) { return (int)((n + (16 << kind) - 1) >> (4 + kind) << 4); }
/* in elements */
ALWAYS int64_t row_stride(const int kind, int64_t n) { return (int64_t)(words_of(kind, n) | 16) << kind; }

/* Squares of a matrix in place: at distance d, blocks off the diagonal change places. */
typedef uint16_t vh __attribute__((vector_size(4 * LANES)));
#define SIDE (2 * LANES) /* halves in a register */
#define EXCHANGE(name, vector, element, n) \
    ALWAYS void name(vector *a, vector *b, const int d) { \
        vector low, high; \
        for (int j = 0; j < n; j++) { \
            low[j] = (element)(j & d ? n + j - d : j); \
            high[j] = (element)(j & d ? n + j : j + d); \
        } \
        vector first = __builtin_shuffle(*a, *b, low); \
        *b = __builtin_shuffle(*a, *b, high); \
        *a = first; \
    }
EXCHANGE(exchange, vh, uint16_t, SIDE)
EXCHANGE(exchange_words, vi, int32_t, LANES)
#undef EXCHANGE
#define STEP(exchange, n, d) \
    _Pragma("GCC unroll 32") for (int i = 0; i < n; i++) if (!(i & d)) exchange(tile + i, tile + i + d, d);
static void transpose(vh *tile) { /* SIDE x SIDE bf16 */
    STEP(exchange, SIDE, 1)
    STEP(exchange, SIDE, 2)
    STEP(exchange, SIDE, 4)
#if LANES > 4
    STEP(exchange, SIDE, 8)
#endif
#if LANES > 8
    STEP(exchange, SIDE, 16)
#endif
}
ALWAYS void transpose_words(vi *tile) { /* LANES x LANES words */
    STEP(exchange_words, LANES, 1)
    STEP(exchange_words, LANES, 2)
#if LANES > 4
    STEP(exchange_words, LANES, 4)
#endif
#if LANES > 8
    STEP(exchange_words, LANES, 8)
#endif
}
#undef STEP
/* From memory to memory, rows of which are `stride` and `away` bytes apart. */
ALWAYS void transpose_block(const char *from, int64_t stride, char *to, int64_t away) {
    vi tile[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) tile[i] = loadi(from + i * stride);
    transpose_words(tile);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) memcpy(to + i * away, tile + i, sizeof(vi));
}

/* Rows (`stride` elements apart) as columns: to[c * away + r]. rows, columns: multiples of 16. */
typedef int16_t wide_bytes __attribute__((vector_size(4 * LANES)));
typedef int8_t side_bytes __attribute__((vector_size(SIDE)));
ALWAYS void transpose_square(const int kind, const int rows, const int columns, const char *from, int64_t stride,
                             char *to, int64_t away) {
    vh tile[SIDE];
    for (int i = 0; i < rows; i++) {
        if (kind == INT8) {
            side_bytes bytes = {0};
            memcpy(&bytes, from + i * stride, (size_t)columns);
            tile[i] = (vh)__builtin_convertvector(bytes, wide_bytes);
        } else {
            memcpy(&tile[i], from + 2 * i * stride, 2 * (size_t)columns);
        }
    }
    transpose(tile);
    for (int i = 0; i < columns; i++) {
        side_bytes bytes = __builtin_convertvector((wide_bytes)tile[i], side_bytes);
        if (kind == INT8) memcpy(to + i * away, &bytes, (size_t)rows);
        else memcpy(to + 2 * i * away, &tile[i], 2 * (size_t)rows);
    }
}
ALWAYS void transpose_halves(const int kind, int rows, int columns, const char *from, int64_t stride, char *to,
                             int64_t away) {
    const int size = kind == INT8 ? 1 : 2;
    for (int c = 0; c < columns; c += SIDE)
        for (int r = 0; r < rows; r += SIDE) {
            const char *here = from + (r * stride + c) * size;
            char *there = to + (c * away + r) * size;
            int high = rows - r < SIDE ? 16 : SIDE, wide = columns - c < SIDE ? 16 : SIDE;
            if (high == SIDE && wide == SIDE) /* sizes known */
                transpose_square(kind, SIDE, SIDE, here, stride, there, away);
            else if (SIDE > 16) transpose_square(kind, high, wide, here, stride, there, away);
        }
}
static void transpose_rows(const int kind, int rows, int columns, const void *from, int64_t stride, void *to,
                           int64_t away) {
    if (kind == INT8) { transpose_halves(INT8, rows, columns, from, stride, to, away); return; }
    if (kind == BF16) { transpose_halves(BF16, rows, columns, from, stride, to, away); return; }
    for (int c = 0; c < columns; c += LANES)
        for (int r = 0; r < rows; r += LANES)
            transpose_block((const char *)((const float *)from + r * stride + c), 4 * stride,
                            (char *)((float *)to + c * away + r), 4 * away);
}

/* Dropout without memory: what is kept depends on a number's place alone. `below` of 2^32 are
 * dropped. (murmur3's mixer) */
typedef struct { uint32_t seed, below; float gain; } drop;
ALWAYS vf dropped(drop d, vu place, vf v) {
    vu h = place * 0x9e3779b1u + d.seed;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    h ^= h >> 16;
    return blend((vi)(h >= d.below), v * d.gain, splat(0.0f));
}
