/* What the compiler was asked to compile for (build.py: -march): whether 16 lanes of integers are multiplied at once,
 * or tiles of them; how many floats a register holds. */
#pragma once
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define ISA_AVX512 1
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#define LANES 4
#endif
#if ISA_AVX512 && defined(__linux__) && \
    ((defined(__AMX_INT8__) && defined(__AMX_BF16__)) || (defined(__AMXINT8__) && defined(__AMXBF16__)))
#define ISA_AMX 1 /* the latter are older clangs' names */
#else
#define ISA_AMX 0
#endif
#include <stdbool.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
