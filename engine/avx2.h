/* AVX2: half a line is one register.
 * Included by kernels.h; what it lacks is in portable.h. */
#pragma once
#include <immintrin.h>
#include "kernels.h"

#define ISA "avx2"
#define GEMM_PANELS 1
#define GEMM_TOKENS 4
#define FEW 4
#define INLINE static inline __attribute__((always_inline))
#define SET(c) _mm256_set1_epi8((char)(c))
#define HALF(p) _mm256_loadu_si256((const __m256i *)(p))
#define FOUR(x) _mm256_set1_epi32(load4(x))

/* sum += codes * x over groups of 4, exactly: `maddubs` saturates at 16 bits, so bytes above 63 go in two halves. */
INLINE __m256i dot4(const int kind, __m256i sum, __m256i code, __m256i four) {
    const __m256i one = _mm256_set1_epi16(1);
    if (kind != Q8) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(code, four), one));
    __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(code, SET(15)), four);
    __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(code, 4), SET(15)), four);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(low, one),
                                                  _mm256_slli_epi32(_mm256_madd_epi16(high, one), 4)));
}

/* Half a line (8 rows) of 2-bit fields times one token; pairs are summed in int16, which 60 of at most 512 cannot leave. */
static void dot1_trit2(const uint8_t *w, int lines, const int8_t *x, int32_t *acc) {
    __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int done = 0; done < lines;) {
        int n = lines - done < 15 ? lines - done : 15;
        __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int i = 0; i < n; i++, w += 64, x += 16)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                __m256i v = HALF(w + 32 * h);
#pragma GCC unroll 4
                for (int p = 0; p < 4; p++)
                    sum[h] = _mm256_add_epi16(sum[h], _mm256_maddubs_epi16(
                        _mm256_and_si256(_mm256_srli_epi16(v, 2 * p), SET(3)), FOUR(x + 4 * p)));
            }
        for (int h = 0; h < 2; h++)
            total[h] = _mm256_add_epi32(total[h], _mm256_madd_epi16(sum[h], _mm256_set1_epi16(1)));
        done += n;
    }
    _mm256_storeu_si256((__m256i *)acc, total[0]);
    _mm256_storeu_si256((__m256i *)(acc + 8), total[1]);
}

INLINE void gemm_kind(const int kind, const int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
    __m256i sum[GEMM_TOKENS][2];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t][0] = HALF(acc + 32 * t), sum[t][1] = HALF(acc + 32 * t + 8);
    for (int k = 0; k < k4; k++, e += 64, x += 4 * T) {
        __m256i w0 = HALF(e), w1 = HALF(e + 32);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            __m256i four = FOUR(x + 4 * t);
            sum[t][0] = dot4(kind, sum[t][0], w0, four);
            sum[t][1] = dot4(kind, sum[t][1], w1, four);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
        _mm256_storeu_si256((__m256i *)(acc + 32 * t), sum[t][0]);
        _mm256_storeu_si256((__m256i *)(acc + 32 * t + 8), sum[t][1]);
    }
}
