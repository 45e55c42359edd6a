/* Plain C, for every other CPU and as the reference of the rest.
 * Included by kernels.h; what it lacks is in portable.h. */
#pragma once
#include "kernels.h"

#define ISA "scalar"
#define GEMM_PANELS 1
#define GEMM_TOKENS 4
#define FEW 4
#define INLINE static inline

INLINE void gemm_kind(const int kind, const int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
    (void)kind;
    for (int k = 0; k < k4; k++, e += 64, x += 4 * T)
        for (int t = 0; t < T; t++)
            for (int r = 0; r < ROWS; r++) {
                int32_t sum = 0;
                for (int j = 0; j < 4; j++) sum += (int32_t)e[4 * r + j] * x[4 * t + j];
                acc[2 * ROWS * t + r] += sum;
            }
}
