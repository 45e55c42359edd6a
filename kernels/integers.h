/* The integer kernels: panels of packed weights times int8 activations, exact in int32 on every instruction set.
 *
 * A panel is 16 rows of a matrix; format.py draws its bits. The lane r of a 64-byte line holds 4 bytes of row r, so
 * one `vpdpbusd` of a line with 4 broadcast activations feeds the sums of 16 rows and nothing is ever added across
 * lanes. Codes are unsigned (a trit + 1, a byte + 128, six bits + 32): acc = sum(code * x) - offset * sum(x).
 *
 * Which instruction set runs is fixed at compile time by -march (build.py); there is one source for all.
 * Neighbours: product.h, which calls dot, expand and gemm. */
#pragma once
#include <pthread.h>
#include <string.h>
#include "amx.h"

#define ROWS 16
enum kind { TRIT2, TRIT16, Q8, Q6, BF16, N_KINDS };  /* format.py: KINDS, in the same order */
/* columns a line (or group of lines) holds, its bytes, and what its codes are above the weights */
static const int COLS[N_KINDS] = {16, 20, 4, 16, 2}, BYTES[N_KINDS] = {64, 64, 64, 192, 64},
                 OFFSET[N_KINDS] = {1, 1, 128, 32, 0};

/* Columns, a multiple of 16 and of 20, whose sums stay below 2^31 even when plane 3 is left at 64 times its value:
 * 128 * 128 * 65536 = 2^30. */
#define COLS_PER_SUM 61440

/* Weights are read once a token, so they are asked for early enough to come from memory: at two distances, since a line
 * that was asked for may still not come (more are wanted than a core can have under way); the farther one only into L2,
 * which takes more of them; or at every kilobyte. Each of these is the fastest on some CPU and the slowest on another
 * (docs/LOG.md), so decoding tries them: `pick_prefetch` in cpu.c. */
enum prefetch { NO_PREFETCH, NEAR, FAR, OFTEN, N_PREFETCH };

static inline __attribute__((always_inline)) void prefetch(const uint8_t *p, enum prefetch how) {
    if (how == NO_PREFETCH) return;
    if (how == FAR) {
        __builtin_prefetch(p + 8192, 0, 2);
        __builtin_prefetch(p + 2048, 0, 3);
        return;
    }
    __builtin_prefetch(p + 3072, 0, 3);
    __builtin_prefetch(p + 1024, 0, 3);
    if (how == NEAR) return;
    __builtin_prefetch(p + 7168, 0, 3);
    __builtin_prefetch(p + 6144, 0, 3);
    __builtin_prefetch(p + 5120, 0, 3);
    __builtin_prefetch(p + 4096, 0, 3);
    __builtin_prefetch(p + 2048, 0, 3);
}

static inline int32_t load4(const int8_t *x) { int32_t v; memcpy(&v, x, 4); return v; }

/* 1.6-bit bytes: f is the number of the first four trits in base 3 (0..80), a the fifth; byte = f < 64 ? 64 a + f :
 * 192 + 3 (f - 64) + a. So bits 6-7 are the fifth trit unless both are set, and one 64-byte table lookup on bits 0-5
 * gives the other four as 2-bit fields.
 * Where a lookup is one of 16 bytes: bits 2-5 give the fields of the first byte of four, and by how much more than 1 (0
 * where bits 6-7 are set) they grow where a multiple of three is passed, which happens once among four. */
static _Alignas(64) uint8_t trit16_low[64], trit16_high[64], trit16_fifth[64], trit16_first[2][16], trit16_step[2][16];

static uint8_t fields_of(int f) { return (uint8_t)(f % 3 | f / 3 % 3 << 2 | f / 9 % 3 << 4 | f / 27 << 6); }

static void make_tables(void) {
    for (int f = 0; f < 64; f++) trit16_low[f] = fields_of(f);
    for (int i = 0; i < 51; i++) trit16_high[i] = fields_of(64 + i / 3), trit16_fifth[i] = (uint8_t)(i % 3 << 6);
    for (int i = 0, multiple = 3; i < 64; i += 4, multiple = (i / 3 + 1) * 3) {
        trit16_first[0][i / 4] = trit16_low[i];
        trit16_first[1][i / 4] = trit16_high[i];
        trit16_step[0][i / 4] = (uint8_t)(trit16_low[multiple] - trit16_low[multiple - 1] - 1);
        trit16_step[1][i / 4] = (uint8_t)(trit16_high[multiple] - trit16_high[i]);
    }
}

/* Each instruction set gives its name ISA, panels and tokens a tile of gemm has (GEMM_PANELS, GEMM_TOKENS), tokens
 * that dot takes (FEW), and
 *
 *   dot     acc[T][2][16] = two panels times a tile of few tokens, 1 <= T <= FEW: decoded in registers and not kept
 *   expand  `groups` groups of lines of one panel as plain codes e[k / 4][GEMM_PANELS][64]; e: its slot
 *   gemm    acc[T][2][16] += GEMM_PANELS expanded panels times a tile of T tokens, 1 <= T <= GEMM_TOKENS
 *
 * on activations x[k / 4][T][4]. how: see `prefetch`. With tiles of AMX there is gemm_tiles. */
#define MOST_TOKENS 16 /* at least what a tile has, on any of them */
#if ISA_AVX512
#include "avx512.h"
#else
#if defined(__AVX2__)
#include "avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "neon.h"
#else
#include "scalar.h"
#endif
#include "portable.h"
#endif

static bool has_tiles;

static void make_ready(void) {
    make_tables();
    has_tiles = ask_for_tiles();
}

/* Before anything else here is called; what it finds stays, whatever threads do at the same time. */
static void get_ready(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_ready);
}

static void expand(int kind, const uint8_t *w, int groups, uint8_t *e) {
    switch (kind) {
        case TRIT2: expand_kind(TRIT2, w, groups, e); break;
        case TRIT16: expand_kind(TRIT16, w, groups, e); break;
        case Q8: expand_kind(Q8, w, groups, e); break;
        default: expand_kind(Q6, w, groups, e); break;
    }
}

/* How many bytes of a packed matrix are no code of its kind. They are counted where a piece has any. */
static int64_t count_invalid(int kind, const uint8_t *w, int64_t bytes) {
    int64_t bad = 0;
    if (kind != TRIT2 && kind != TRIT16) return 0;
    for (int64_t from = 0; from < bytes; from += 4096) {
        int64_t end = from + 4096 < bytes ? from + 4096 : bytes;
        uint8_t seen = 0;
        if (kind == TRIT2) for (int64_t i = from; i < end; i++) seen |= w[i] & w[i] >> 1 & 0x55; /* a field of 3 */
        else for (int64_t i = from; i < end; i++) seen |= w[i] > 242;
        for (int64_t i = from; seen && i < end; i++)
            bad += kind == TRIT2 ? (w[i] & w[i] >> 1 & 0x55) != 0 : w[i] > 242;
    }
    return bad;
}
