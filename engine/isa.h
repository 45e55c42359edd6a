/* What the compiler was asked to compile for (build.py: -march): whether 16 lanes of integers are multiplied at once, how
 * many floats a register holds, and whether the CPU is one of AMD's. */
#pragma once
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define ISA_AVX512 1
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__znver1__) || defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
#define ZEN 1
#else
#define ZEN 0
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif
