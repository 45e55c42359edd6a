/* A register of floats at a time, in one order of additions whatever its width, the number of tokens in a chunk or the
 * number of threads: sums of a row are those of 16 lanes, or of a multiple, in as many registers as that takes. (The
 * compiler's own vectors of 64 bytes would read better, but GCC keeps those in memory where registers are narrower.)
 * Neighbours: integers.h for the integers, cpu.c and gpt/fused.c for who calls this. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "isa.h"

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int8_t vb __attribute__((vector_size(LANES)));

#define WAYS (16 / LANES) /* registers for 16 lanes */
#define ALWAYS static inline __attribute__((always_inline))

ALWAYS vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
ALWAYS void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
ALWAYS vi loadi(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
ALWAYS vf splat(float x) { return x - (vf){0}; }
ALWAYS vi splati(int32_t x) { return x + (vi){0}; }
#if LANES == 16
ALWAYS vi lanes(void) { return (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
#elif LANES == 8
ALWAYS vi lanes(void) { return (vi){0, 1, 2, 3, 4, 5, 6, 7}; }
#else
ALWAYS vi lanes(void) { return (vi){0, 1, 2, 3}; }
#endif
ALWAYS vf blend(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
#if LANES == 16
ALWAYS vf fmav(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ALWAYS vf maxv(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
ALWAYS vf minv(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif LANES == 8
ALWAYS vf fmav(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ALWAYS vf maxv(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
ALWAYS vf minv(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
ALWAYS vf fmav(vf a, vf b, vf c) { return a * b + c; }
ALWAYS vf maxv(vf a, vf b) { return blend(a > b, a, b); }
ALWAYS vf minv(vf a, vf b) { return blend(a < b, a, b); }
#endif
ALWAYS vf absv(vf x) { return (vf)((vi)x & 0x7fffffff); }
ALWAYS vf tofloat(vi x) { return __builtin_convertvector(x, vf); }
ALWAYS vi toint(vf x) { return __builtin_convertvector(x, vi); }
ALWAYS vb tobytes(vi x) { /* of -128 ... 127 */
#if LANES == 8 /* GCC 12 takes it apart */
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    __m128i bytes = _mm_packs_epi16(halves, halves);
    vb b;
    memcpy(&b, &bytes, sizeof b);
    return b;
#else
    return __builtin_convertvector(x, vb);
#endif
}
/* To the nearest integer, halves to even: below 2^22 the sum has no bits left for a fraction. */
ALWAYS vf roundv(vf x) { return (x + 12582912.0f) - 12582912.0f; }

/* Of 16 lanes, `v`: halves, quarters, pairs. */
#if LANES == 16
#if defined(__clang__)
#define PERMUTED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define PERMUTED(v, ...) __builtin_shuffle(v, (vi){__VA_ARGS__})
#endif
#define FOLDED(v, with) \
    vf s = *v; \
    s = with(s, PERMUTED(s, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15)); \
    s = with(s, PERMUTED(s, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7)); \
    s = with(s, PERMUTED(s, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3)); \
    s = with(s, PERMUTED(s, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)); \
    return s[0];
ALWAYS vf addv(vf a, vf b) { return a + b; }
ALWAYS float sum_of(const vf *v) { FOLDED(v, addv) }
ALWAYS float max_of(const vf *v) { FOLDED(v, maxv) }
#undef FOLDED
#else
ALWAYS float sum_of(const vf *v) {
    float s[16];
    memcpy(s, v, 64);
    for (int half = 8; half; half /= 2) for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}
ALWAYS float max_of(const vf *v) {
    float s[16];
    memcpy(s, v, 64);
    for (int half = 8; half; half /= 2) for (int i = 0; i < half; i++) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
    return s[0];
}
#endif
ALWAYS int32_t sum_ofi(vi v) {
    int32_t s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}

/* e^x within 2 ulp on [-87, 88], clamped outside: 2^n times a polynomial on [-ln2/2, ln2/2]. */
ALWAYS vf expv(vf x) {
    x = maxv(minv(x, splat(88.0f)), splat(-87.0f));
    vf n = roundv(x * 1.44269504f);
    vf r = fmav(n, splat(-0.693359375f), x); /* ln 2 in two parts, the first exact in few bits */
    r = fmav(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fmav(p, r, splat(1.3981999507e-3f));
    p = fmav(p, r, splat(8.3334519073e-3f));
    p = fmav(p, r, splat(4.1665795894e-2f));
    p = fmav(p, r, splat(1.6666665459e-1f));
    p = fmav(p, r, splat(5.0000001201e-1f));
    p = fmav(p, r * r, r) + 1.0f;
    return (vf)((vi)p + (toint(n) << 23));
}

/* sum of squares of n floats, n a multiple of 16, in 64 lanes */
ALWAYS float sum_squares(const float *x, int n) {
    vf s[4 * WAYS] = {{0}};
    int i = 0;
    for (; i + 64 <= n; i += 64)
#pragma GCC unroll 16
        for (int u = 0; u < 4 * WAYS; u++) { vf v = load(x + i + LANES * u); s[u] = fmav(v, v, s[u]); }
    for (; i < n; i += 16)
        for (int u = 0; u < WAYS; u++) { vf v = load(x + i + LANES * u); s[u] = fmav(v, v, s[u]); }
    for (int u = 0; u < WAYS; u++) s[u] = (s[u] + s[WAYS + u]) + (s[2 * WAYS + u] + s[3 * WAYS + u]);
    return sum_of(s);
}
