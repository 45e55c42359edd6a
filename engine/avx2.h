/* AVX2, and AVX-VNNI where the CPU has it: half a line is one register.
 * Included by kernels.h before portable.h, which does the rest. */
#pragma once
#include <immintrin.h>
#include "kernels.h"

#define GEMM_PANELS 1
#define FEW 2
#define WIDTH 32
#define INLINE static inline __attribute__((always_inline))
typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
typedef int32_t sums __attribute__((vector_size(WIDTH)));

#if defined(__AVXVNNI__)
#define ISA "avxvnni"
#define GEMM_TOKENS 6
INLINE sums dot4(const int kind, sums sum, bytes code, sums x) {
    (void)kind;
    return (sums)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)code, (__m256i)x);
}
#else
#define ISA "avx2"
#define GEMM_TOKENS 4
/* `maddubs` saturates at 16 bits, so bytes above 63 go in two halves. */
INLINE sums dot4(const int kind, sums sum, bytes code, sums x) {
    const __m256i one = _mm256_set1_epi16(1);
    if (kind != Q8) return sum + (sums)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)code, (__m256i)x), one);
    sums low = (sums)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)(code & 15), (__m256i)x), one);
    sums high = (sums)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)(code >> 4), (__m256i)x), one);
    return sum + low + (high << 4);
}
#endif

/* Four tables of 16 bytes; bits 5 and 4 of the index, moved to each byte's sign, choose. */
INLINE bytes lookup(const uint8_t *table, bytes index) {
    __m256i i = (__m256i)index, from[4];
    for (int t = 0; t < 4; t++)
        from[t] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(table + 16 * t))),
                                      (__m256i)(index & 15));
    __m256i bit4 = _mm256_slli_epi16(i, 3), bit5 = _mm256_slli_epi16(i, 2);
    return (bytes)_mm256_blendv_epi8(_mm256_blendv_epi8(from[0], from[1], bit4),
                                     _mm256_blendv_epi8(from[2], from[3], bit4), bit5);
}
