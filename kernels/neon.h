/* NEON with the dot products of ARMv8.2 (`sdot`), and `usdot` where the CPU has it: a quarter of a line is one
 * register. Included by integers.h before portable.h, which does the rest. */
#pragma once
#include <arm_neon.h>
#include "integers.h"

#define GEMM_PANELS 1
#define GEMM_TOKENS 6
#define FEW 2
#define WIDTH 16
#define INLINE static inline __attribute__((always_inline))
typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
typedef uint16_t halves __attribute__((vector_size(WIDTH)));
typedef int32_t sums __attribute__((vector_size(WIDTH)));

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define ISA "neon-i8mm"
INLINE sums dot4(const int kind, sums sum, bytes code, sums x) {
    (void)kind;
    return (sums)vusdotq_s32((int32x4_t)sum, (uint8x16_t)code, (int8x16_t)x);
}
#else
#define ISA "neon"
/* Signed bytes only: codes that need all eight bits are 128 too small, which 64 * x twice makes good. */
INLINE sums dot4(const int kind, sums sum, bytes code, sums x) {
    const int8x16_t x_i8 = (int8x16_t)x, half = vdupq_n_s8(64);
    if (kind != Q8) return (sums)vdotq_s32((int32x4_t)sum, (int8x16_t)code, x_i8);
    int32x4_t made = vdotq_s32((int32x4_t)sum, (int8x16_t)(code ^ 128), x_i8);
    return (sums)vdotq_s32(vdotq_s32(made, half, x_i8), half, x_i8);
}
#endif

INLINE bytes lookup(const uint8_t *table, bytes index) {
    return (bytes)vqtbl4q_u8(vld1q_u8_x4(table), (uint8x16_t)index);
}
