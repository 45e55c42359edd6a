/* What the kernels of training compute with, 16 at a time: "values" (bf16 or fp32), and the words of 4 bytes that products
 * are made of. Neighbours: fused.c, which says what for. */
#pragma once
#include <stdlib.h>
#include "floats16.h"

#define AT(p, i) ((const char *)(p) + (size_t)(i) * (bf16 ? 2 : 4))
#define TO(p, i) ((char *)(p) + (size_t)(i) * (bf16 ? 2 : 4))

typedef uint16_t h16 __attribute__((vector_size(32)));

/* Conversions that GCC 12 makes of many instructions. */
#if ISA_AVX512
ALWAYS u16 widen(h16 h) { return (u16)_mm512_cvtepu16_epi32((__m256i)h); }
ALWAYS i16 widen_bytes(b16 b) { return (i16)_mm512_cvtepi8_epi32((__m128i)b); }
#else
ALWAYS u16 widen(h16 h) { return __builtin_convertvector(h, u16); }
ALWAYS i16 widen_bytes(b16 b) { return __builtin_convertvector(b, i16); }
#endif

ALWAYS v16 get(const char *p, const int bf16) {
    if (!bf16) return load((const float *)(const void *)p);
    h16 h;
    memcpy(&h, p, 32);
    return (v16)(widen(h) << 16);
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

ALWAYS void put32(char *p, v16 a, v16 b) { /* bf16 */
#if defined(__AVX512BF16__)
    __m512bh h = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    memcpy(p, &h, 64);
#else
    put(p, a, 1), put(p + 32, b, 1);
#endif
}

/* A word holds 1 << kind elements. Rows that are multiplied have whole lines of 16 words, zeros behind their end, and are an
 * odd number of lines apart: rows that are a power of two apart push each other out of the caches. */
enum kind { FLOAT, BF16, INT8 };
ALWAYS int words_of(const int kind, int64_t n) { return (int)((n + (16 << kind) - 1) >> (4 + kind) << 4); }
ALWAYS int64_t apart(const int kind, int64_t n) { return (int64_t)(words_of(kind, n) | 16) << kind; } /* in elements */

ALWAYS i16 lanes(void) { return (i16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

/* Squares of a matrix in place: at distance d, blocks off the diagonal change places. */
typedef uint16_t h32 __attribute__((vector_size(64)));
#define EXCHANGE(name, vector, element, n) \
    ALWAYS void name(vector *a, vector *b, const int d) { \
        vector low, high; \
        for (int j = 0; j < n; j++) low[j] = (element)(j & d ? n + j - d : j), high[j] = (element)(j & d ? n + j : j + d); \
        vector first = __builtin_shuffle(*a, *b, low); \
        *b = __builtin_shuffle(*a, *b, high); \
        *a = first; \
    }
EXCHANGE(exchange, h32, uint16_t, 32)
EXCHANGE(exchange_words, i16, int32_t, 16)
#undef EXCHANGE
#define STEP(exchange, n, d) for (int i = 0; i < n; i++) if (!(i & d)) exchange(tile + i, tile + i + d, d);
static void turn(h32 *tile) { /* 32 x 32 bf16 */
#pragma GCC unroll 32
    STEP(exchange, 32, 1)
#pragma GCC unroll 32
    STEP(exchange, 32, 2)
#pragma GCC unroll 32
    STEP(exchange, 32, 4)
#pragma GCC unroll 32
    STEP(exchange, 32, 8)
#pragma GCC unroll 32
    STEP(exchange, 32, 16)
}
ALWAYS void turn_words(i16 *tile) { /* 16 x 16 words */
#pragma GCC unroll 16
    STEP(exchange_words, 16, 1)
#pragma GCC unroll 16
    STEP(exchange_words, 16, 2)
#pragma GCC unroll 16
    STEP(exchange_words, 16, 4)
#pragma GCC unroll 16
    STEP(exchange_words, 16, 8)
}
#undef STEP

/* Rows (`stride` elements apart) as columns: to[c * away + r]. rows, columns: multiples of 16. */
typedef int16_t s32 __attribute__((vector_size(64)));
typedef int8_t b32 __attribute__((vector_size(32)));
ALWAYS void turn_square(const int kind, const int rows, const int columns, const char *from, int64_t stride, char *to,
                        int64_t away) {
    h32 tile[32];
    for (int i = 0; i < rows; i++) {
        if (kind == INT8) {
            b32 bytes = {0};
            memcpy(&bytes, from + i * stride, (size_t)columns);
            tile[i] = (h32)__builtin_convertvector(bytes, s32);
        } else {
            memcpy(&tile[i], from + 2 * i * stride, 2 * (size_t)columns);
        }
    }
    turn(tile);
    for (int i = 0; i < columns; i++) {
        b32 bytes = __builtin_convertvector((s32)tile[i], b32);
        if (kind == INT8) memcpy(to + i * away, &bytes, (size_t)rows);
        else memcpy(to + 2 * i * away, &tile[i], 2 * (size_t)rows);
    }
}
ALWAYS void turn_halves(const int kind, int rows, int columns, const char *from, int64_t stride, char *to, int64_t away) {
    const int size = kind == INT8 ? 1 : 2;
    for (int c = 0; c < columns; c += 32)
        for (int r = 0; r < rows; r += 32) {
            const char *here = from + (r * stride + c) * size;
            char *there = to + (c * away + r) * size;
            if (columns - c >= 32 && rows - r >= 32) turn_square(kind, 32, 32, here, stride, there, away); /* sizes known */
            else turn_square(kind, rows - r < 32 ? 16 : 32, columns - c < 32 ? 16 : 32, here, stride, there, away);
        }
}
static void turn_rows(const int kind, int rows, int columns, const void *from, int64_t stride, void *to, int64_t away) {
    if (kind == INT8) { turn_halves(INT8, rows, columns, from, stride, to, away); return; }
    if (kind == BF16) { turn_halves(BF16, rows, columns, from, stride, to, away); return; }
    for (int c = 0; c < columns; c += 16)
        for (int r = 0; r < rows; r += 16) {
            i16 tile[16];
            for (int i = 0; i < 16; i++) tile[i] = loadi((const float *)from + (r + i) * stride + c);
            turn_words(tile);
            for (int i = 0; i < 16; i++) memcpy((float *)to + (c + i) * away + r, tile + i, 64);
        }
}

/* Dropout without memory: what is kept depends on a number's place alone. `below` of 2^32 are dropped. (murmur3's mixer) */
typedef struct { uint32_t seed, below; float gain; } drop;
ALWAYS v16 dropped(drop d, u16 place, v16 v) {
    u16 h = place * 0x9e3779b1u + d.seed;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    h ^= h >> 16;
    return choose((i16)(h >= d.below), v * d.gain, all(0.0f));
}
