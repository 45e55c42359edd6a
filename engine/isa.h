/* What the compiler was asked to compile for (build.py: -march): whether 16 lanes of integers are multiplied at once, how
 * many floats a register holds. */
#pragma once
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define ISA_AVX512 1
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif
