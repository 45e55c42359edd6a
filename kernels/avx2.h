/* AVX2, and AVX-VNNI where the CPU has it: half a line is one register.
 * Included by integers.h before portable.h, which does the rest. */
#pragma once
#include <immintrin.h>
#include "integers.h"

#define GEMM_PANELS 1
#define GEMM_TOKENS 6
#define FEW 2
#define WIDTH 32
#define INLINE static inline __attribute__((always_inline))
typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
typedef uint16_t halves __attribute__((vector_size(WIDTH)));
typedef int32_t sums __attribute__((vector_size(WIDTH)));

#if defined(__AVXVNNI__)
#define ISA "avxvnni"
INLINE sums dot4(const int kind, sums sum, bytes code, sums x) {
    (void)kind;
    return (sums)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)code, (__m256i)x);
}
#else
#define ISA "avx2"
#define PARTIAL 64 /* of at most 2 * 2 * 128 each, or 16 of four times that: -2^15 just fits */
typedef int16_t partial __attribute__((vector_size(WIDTH)));
INLINE partial two(bytes code, sums x) { return (partial)_mm256_maddubs_epi16((__m256i)code, (__m256i)x); }
INLINE sums total(partial sum) { return (sums)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
/* Sums of two products saturate at 16 bits, so bytes above 63 go in two halves. */
INLINE sums dot4(const int kind, sums sum, bytes code, sums x) {
    if (kind != Q8) return sum + total(two(code, x));
    return sum + total(two(code & 15, x)) + (total(two(code >> 4, x)) << 4);
}
/* Sums of trits stay within 16 bits for so many words. */
INLINE partial add_trits(partial sum, bytes code, sums x) { return sum + two(code, x); }
#endif

INLINE bytes found(const uint8_t *table, bytes index) {
    __m256i twice = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)table));
    return (bytes)_mm256_shuffle_epi8(twice, (__m256i)index);
}
INLINE bytes where(bytes sign, bytes yes, bytes no) {
    return (bytes)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, (__m256i)sign);
}
INLINE bytes fields(bytes v, bytes *fifth) {
    static const _Alignas(16) uint8_t modulo_3[16] = {0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0};
    bytes quarter = (bytes)((halves)v >> 2) & 15, rest = v & 3, escaped = v & (v + v); /* bit 7: both are set */
    bytes of_three = found(modulo_3, quarter) + rest;
    bytes passed = (bytes)_mm256_cmpgt_epi8((__m256i)of_three, _mm256_set1_epi8(2));
    bytes first = where(escaped, found(trit16_first[1], quarter), found(trit16_first[0], quarter) + rest);
    bytes step = where(escaped, found(trit16_step[1], quarter), found(trit16_step[0], quarter));
    bytes remainder = (bytes)_mm256_min_epu8((__m256i)of_three, (__m256i)(of_three - 3));
    *fifth = where(escaped, remainder, (bytes)((halves)v >> 6) & 3);
    return first + (step & passed);
}
