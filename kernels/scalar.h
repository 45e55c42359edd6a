/* Plain C, for every other CPU: no instruction of one machine, only what the compiler makes of its vectors.
 * Included by integers.h before portable.h, which does the rest. */
#pragma once
#include "integers.h"

#define ISA "scalar"
#define GEMM_PANELS 1
#define GEMM_TOKENS 4
#define FEW 2
#define WIDTH 16
#define INLINE static inline
typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
typedef uint16_t halves __attribute__((vector_size(WIDTH)));
typedef int32_t sums __attribute__((vector_size(WIDTH)));

/* Never inlined: a call a part costs little beside sixteen products, and the compiler is done in a second. */
static __attribute__((noinline)) sums dot4(const int kind, sums sum, bytes code, sums x) {
    typedef int8_t signed_bytes __attribute__((vector_size(WIDTH)));
    typedef int16_t words __attribute__((vector_size(2 * WIDTH)));
    typedef int32_t pairs __attribute__((vector_size(2 * WIDTH)));
    words made = __builtin_convertvector(code, words)
                 * __builtin_convertvector((signed_bytes)x, words); /* at most 2^15 */
    pairs two = ((pairs)made << 16 >> 16) + ((pairs)made >> 16);
    (void)kind;
    for (int r = 0; r < WIDTH / 4; r++) sum[r] += two[2 * r] + two[2 * r + 1];
    return sum;
}

INLINE bytes lookup(const uint8_t *table, bytes index) {
    uint8_t i[WIDTH], found[WIDTH];
    memcpy(i, &index, WIDTH);
    for (int b = 0; b < WIDTH; b++) found[b] = table[i[b]];
    memcpy(&index, found, WIDTH);
    return index;
}
