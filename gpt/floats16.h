/* Sixteen floats at a time, in one order of additions whatever the instruction set's width, the number of tokens in a
 * chunk or the number of threads: the compiler cuts a v16 into what the machine has.
 * Neighbours: kernels.h for the integers, cpu.c and gpt/fused.c for who calls this. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "../engine/isa.h"

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef int8_t b16 __attribute__((vector_size(16)));

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS v16 load(const float *p) { v16 v; memcpy(&v, p, 64); return v; }
ALWAYS void store(float *p, v16 v) { memcpy(p, &v, 64); }
ALWAYS i16 loadi(const void *p) { i16 v; memcpy(&v, p, 64); return v; }
ALWAYS v16 all(float x) { return x - (v16){0}; }
ALWAYS i16 alli(int32_t x) { return x + (i16){0}; }
ALWAYS v16 choose(i16 mask, v16 a, v16 b) { return (v16)((mask & (i16)a) | (~mask & (i16)b)); }
#if ISA_AVX512
ALWAYS v16 fma16(v16 a, v16 b, v16 c) { return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ALWAYS v16 max16(v16 a, v16 b) { return (v16)_mm512_max_ps((__m512)a, (__m512)b); }
ALWAYS v16 min16(v16 a, v16 b) { return (v16)_mm512_min_ps((__m512)a, (__m512)b); }
#else
ALWAYS v16 fma16(v16 a, v16 b, v16 c) { return a * b + c; }
ALWAYS v16 max16(v16 a, v16 b) { return choose(a > b, a, b); }
ALWAYS v16 min16(v16 a, v16 b) { return choose(a < b, a, b); }
#endif
ALWAYS v16 abs16(v16 x) { return (v16)((i16)x & 0x7fffffff); }
ALWAYS v16 tofloat(i16 x) { return __builtin_convertvector(x, v16); }
/* To the nearest integer, halves to even: below 2^22 the sum has no bits left for a fraction. */
ALWAYS v16 round16(v16 x) { return (x + 12582912.0f) - 12582912.0f; }

#if ISA_AVX512 /* in the same order: halves, quarters, pairs */
#define FOLDED(v, with) \
    v = with(v, __builtin_shuffle(v, (i16){8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15})); \
    v = with(v, __builtin_shuffle(v, (i16){4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7})); \
    v = with(v, __builtin_shuffle(v, (i16){2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3})); \
    v = with(v, __builtin_shuffle(v, (i16){1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1})); \
    return v[0];
ALWAYS v16 add16(v16 a, v16 b) { return a + b; }
ALWAYS float sum_of(v16 v) { FOLDED(v, add16) }
ALWAYS float max_of(v16 v) { FOLDED(v, max16) }
#undef FOLDED
#else
ALWAYS float sum_of(v16 v) {
    float s[16];
    memcpy(s, &v, 64);
    for (int half = 8; half; half /= 2) for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}
ALWAYS float max_of(v16 v) {
    float s[16];
    memcpy(s, &v, 64);
    for (int half = 8; half; half /= 2) for (int i = 0; i < half; i++) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
    return s[0];
}
#endif
ALWAYS int32_t sum_ofi(i16 v) {
    int32_t s = 0;
    for (int i = 0; i < 16; i++) s += v[i];
    return s;
}

/* e^x within 2 ulp on [-87, 88], clamped outside: 2^n times a polynomial on [-ln2/2, ln2/2]. */
ALWAYS v16 exp16(v16 x) {
    x = max16(min16(x, all(88.0f)), all(-87.0f));
    v16 n = round16(x * 1.44269504f);
    v16 r = fma16(n, all(-0.693359375f), x); /* ln 2 in two parts, the first exact in few bits */
    r = fma16(n, all(2.12194440e-4f), r);
    v16 p = all(1.9875691500e-4f);
    p = fma16(p, r, all(1.3981999507e-3f));
    p = fma16(p, r, all(8.3334519073e-3f));
    p = fma16(p, r, all(4.1665795894e-2f));
    p = fma16(p, r, all(1.6666665459e-1f));
    p = fma16(p, r, all(5.0000001201e-1f));
    p = fma16(p, r * r, r) + 1.0f;
    return (v16)((i16)p + (__builtin_convertvector(n, i16) << 23));
}

/* sum of squares of n floats, n a multiple of 16 */
ALWAYS float sum_squares(const float *x, int n) {
    v16 s[4] = {{0}, {0}, {0}, {0}};
    int i = 0;
    for (; i + 64 <= n; i += 64)
        for (int u = 0; u < 4; u++) { v16 v = load(x + i + 16 * u); s[u] = fma16(v, v, s[u]); }
    for (; i < n; i += 16) { v16 v = load(x + i); s[0] = fma16(v, v, s[0]); }
    return sum_of((s[0] + s[1]) + (s[2] + s[3]));
}
