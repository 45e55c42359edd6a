/* What the compiler was asked to compile for (build.py: -march): whether 16 lanes of integers are multiplied at once. */
#pragma once
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define ISA_AVX512 1
#include <immintrin.h>
#endif
