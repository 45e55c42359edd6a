/* The integer kernels: panels of packed weights times int8 activations, exact in int32 on every instruction set.
 *
 * A panel is 16 rows of a matrix; format.py draws its bits. The lane r of a 64-byte line holds 4 bytes of row r, so
 * one `vpdpbusd` of a line with 4 broadcast activations feeds the sums of 16 rows and nothing is ever added across
 * lanes. Codes are unsigned (a trit + 1, a byte + 128, six bits + 32): acc = sum(code * x) - offset * sum(x).
 *
 * Which instruction set runs is fixed at compile time by -march (build.py); there is one source for all.
 * Neighbours: cpu.c, which calls dot, expand and gemm. */
#pragma once
#include <stdint.h>
#include <string.h>

#define ROWS 16
enum kind { TRIT2, TRIT16, Q8, Q6, BF16, N_KINDS };  /* format.py: KINDS, in the same order */
/* columns a line (or group of lines) holds, its bytes, and what its codes are above the weights */
static const int COLS[N_KINDS] = {16, 20, 4, 16, 2}, BYTES[N_KINDS] = {64, 64, 64, 192, 64},
                 OFFSET[N_KINDS] = {1, 1, 128, 32, 0};

/* Sums stay below 2^31 for this many columns even when plane 3 is left at 64 times its value: 128 * 128 * 65536 = 2^30. */
#define COLS_PER_SUM 61440 /* a multiple of 16 and of 20 */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define ISA_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__)
#define ISA_AVX2 1
#include <immintrin.h>
#endif

static inline int32_t load4(const int8_t *x) { int32_t v; memcpy(&v, x, 4); return v; }

/* 1.6-bit bytes: f is the number of the first four trits in base 3 (0..80), a the fifth; byte = f < 64 ? 64 a + f :
 * 192 + 3 (f - 64) + a. So bits 6-7 are the fifth trit unless both are set, and one 64-byte table lookup on bits 0-5
 * gives the other four as 2-bit fields. */
static _Alignas(64) uint8_t trit16_low[64], trit16_high[64], trit16_fifth[64];

static void make_tables(void) {
    for (int f = 0; f < 81; f++) {
        uint8_t fields = (uint8_t)(f % 3 | f / 3 % 3 << 2 | f / 9 % 3 << 4 | f / 27 << 6);
        if (f < 64) trit16_low[f] = fields;
        else for (int a = 0; a < 3; a++) {
            trit16_high[3 * (f - 64) + a] = fields;
            trit16_fifth[3 * (f - 64) + a] = (uint8_t)(a << 6);
        }
    }
}

/* ---------------------------------------------------------------- AVX-512 VNNI ---------------------------------- */
#if ISA_AVX512
#define ISA "avx512"
#define GEMM_PANELS 2
#define GEMM_TOKENS 14 /* 2 * 14 accumulators, 2 weights, 1 activation: 31 of 32 registers */
#define FEW 8
#define INLINE static inline __attribute__((always_inline))
#define SET(c) _mm512_set1_epi8((char)(c))
#define LINE(p) _mm512_loadu_si512((const void *)(p))
#define FOUR(x) _mm512_set1_epi32(load4(x))

/* Weights are read once a token, in one stream: they are asked for early enough to come from memory, and again later to
 * come from L2. 3% to 18% faster than either distance alone, 20% faster than the hardware's own prefetching. */
#define AHEAD(p) (__builtin_prefetch((p) + 8192, 0, 2), __builtin_prefetch((p) + 2048, 0, 3))

typedef struct { __m512i q[5]; } planes;

#if defined(__AVX512VBMI__)
#define permute(table, index) _mm512_permutexvar_epi8(index, table)
#define permute_where(other, mask, table, index) _mm512_mask_permutexvar_epi8(other, mask, index, table)
#else
INLINE __m512i permute(__m512i table, __m512i index) { /* four 16-byte shuffles, chosen by bits 4-5 */
    __m512i low = _mm512_and_si512(index, SET(15)), made = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        __mmask64 here = _mm512_cmpeq_epi8_mask(_mm512_and_si512(index, SET(48)), SET(16 * i));
        __m512i part = _mm512_permutexvar_epi64(_mm512_set_epi64(2*i+1, 2*i, 2*i+1, 2*i, 2*i+1, 2*i, 2*i+1, 2*i), table);
        made = _mm512_mask_shuffle_epi8(made, here, part, low);
    }
    return made;
}
#define permute_where(other, mask, table, index) _mm512_mask_blend_epi8(mask, other, permute(table, index))
#endif

/* A line as planes of codes that still stand at their bits: plane p is 4^p times its codes, the fifth 64 times. */
INLINE planes standing(const int kind, const uint8_t *w) {
    __m512i v = LINE(w), fifth = v;
    if (kind == TRIT16) {
        __mmask64 escaped = _mm512_cmpge_epu8_mask(v, SET(192));
        fifth = permute_where(_mm512_and_si512(v, SET(192)), escaped, LINE(trit16_fifth), v);
        v = permute_where(permute(LINE(trit16_low), v), escaped, LINE(trit16_high), v);
    }
    return (planes){{_mm512_and_si512(v, SET(3)), _mm512_and_si512(v, SET(12)), _mm512_and_si512(v, SET(48)),
                     _mm512_and_si512(v, SET(192)), fifth}};
}

/* A group of lines as planes of plain codes, ready to be multiplied: COLS / 4 planes. */
INLINE planes codes(const int kind, const uint8_t *w) {
    planes s;
    if (kind == TRIT2 || kind == TRIT16) {
        s = standing(kind, w);
        for (int p = 1; p < 4; p++) s.q[p] = _mm512_srli_epi16(s.q[p], (unsigned)(2 * p));
        s.q[4] = _mm512_srli_epi16(s.q[4], 6);
    } else if (kind == Q8) {
        s.q[0] = LINE(w);
    } else { /* Q6: low four bits from lines 0-1, high two from line 2 */
        __m512i a = LINE(w), b = LINE(w + 64), c = LINE(w + 128), low = SET(15), six = SET(63);
        /* 0xCA: where `low` has a bit take the first, else the second */
        s.q[0] = _mm512_and_si512(six, _mm512_ternarylogic_epi32(low, a, _mm512_slli_epi16(c, 4), 0xCA));
        s.q[1] = _mm512_and_si512(six, _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(a, 4), _mm512_slli_epi16(c, 2), 0xCA));
        s.q[2] = _mm512_and_si512(six, _mm512_ternarylogic_epi32(low, b, c, 0xCA));
        s.q[3] = _mm512_and_si512(six, _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(b, 4), _mm512_srli_epi16(c, 2), 0xCA));
    }
    return s;
}

/* One panel of trits times one token: two line operations (and, dot) a plane, 64 weights a cycle at 2 bits. */
INLINE void dot1_trits(const int kind, const uint8_t *w, int lines, const int8_t *x, int32_t *acc) {
    const int P = kind == TRIT16 ? 5 : 4, U = kind == TRIT16 ? 2 : 4;
    __m512i total = _mm512_setzero_si512();
    for (int done = 0; done < lines;) {
        int n = lines - done < COLS_PER_SUM / 20 ? lines - done : COLS_PER_SUM / 20, i = 0;
        __m512i sum[4][5];
        for (int u = 0; u < U; u++) for (int p = 0; p < P; p++) sum[u][p] = _mm512_setzero_si512();
        for (; i + U <= n; i += U) {
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) {
                planes s = standing(kind, w + 64 * u);
                AHEAD(w + 64 * u);
#pragma GCC unroll 5
                for (int p = 0; p < P; p++) sum[u][p] = _mm512_dpbusd_epi32(sum[u][p], s.q[p], FOUR(x + 4 * (u * P + p)));
            }
            w += 64 * U, x += 4 * P * U;
        }
        for (; i < n; i++, w += 64, x += 4 * P) {
            planes s = standing(kind, w);
#pragma GCC unroll 5
            for (int p = 0; p < P; p++) sum[0][p] = _mm512_dpbusd_epi32(sum[0][p], s.q[p], FOUR(x + 4 * p));
        }
#pragma GCC unroll 5
        for (int p = 0; p < P; p++) {
            for (int u = 1; u < U; u++) sum[0][p] = _mm512_add_epi32(sum[0][p], sum[u][p]);
            total = _mm512_add_epi32(total, _mm512_srai_epi32(sum[0][p], p < 4 ? (unsigned)(2 * p) : 6));
        }
        done += n;
    }
    _mm512_storeu_si512(acc, total);
}

/* One panel times T tokens given as x[k / 4][T][4]. A dot product takes 5 cycles and two start in each, so at least 10
 * sums must be on their way. */
INLINE void dot_few(const int kind, const int T, const uint8_t *w, int groups, const int8_t *x, int32_t *acc) {
    const int P = COLS[kind] / 4, S = T > 4 ? 2 : 4;
    __m512i sum[4][8];
    for (int u = 0; u < S; u++) for (int t = 0; t < T; t++) sum[u][t] = _mm512_setzero_si512();
    for (int i = 0; i < groups; i++, w += BYTES[kind], x += 4 * P * T) {
        planes s = codes(kind, w);
        for (int b = 0; b < BYTES[kind]; b += 64) AHEAD(w + b);
#pragma GCC unroll 5
        for (int p = 0; p < P; p++)
#pragma GCC unroll 8
            for (int t = 0; t < T; t++)
                sum[p % S][t] = _mm512_dpbusd_epi32(sum[p % S][t], s.q[p], FOUR(x + 4 * (p * T + t)));
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        for (int u = 1; u < S; u++) sum[0][t] = _mm512_add_epi32(sum[0][t], sum[u][t]);
        _mm512_storeu_si512(acc + ROWS * t, sum[0][t]);
    }
}

INLINE void dot_kind(const int kind, int T, const uint8_t *w, int groups, const int8_t *x, int32_t *acc) {
#define CASE(n) case n: dot_few(kind, n, w, groups, x, acc); break;
    switch (T) { CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        default: if (kind == TRIT2 || kind == TRIT16) dot1_trits(kind, w, groups, x, acc);
                 else dot_few(kind, 1, w, groups, x, acc); }
#undef CASE
}

/* acc[T][16] = one panel times a tile of few tokens, 1 <= T <= FEW: decoded in registers and not kept. */
static void dot(int kind, int T, const uint8_t *w, int groups, const int8_t *x, int32_t *acc) {
    if (kind == TRIT2) dot_kind(TRIT2, T, w, groups, x, acc);
    else if (kind == TRIT16) dot_kind(TRIT16, T, w, groups, x, acc);
    else if (kind == Q8) dot_kind(Q8, T, w, groups, x, acc);
    else dot_kind(Q6, T, w, groups, x, acc);
}

INLINE void expand_kind(const int kind, const uint8_t *w, int groups, uint8_t *e) {
    const int P = COLS[kind] / 4;
    for (int i = 0; i < groups; i++, w += BYTES[kind], e += P * GEMM_PANELS * 64) {
        planes s = codes(kind, w);
        for (int i = 0; i < BYTES[kind]; i += 64) AHEAD(w + i);
#pragma GCC unroll 5
        for (int p = 0; p < P; p++) _mm512_storeu_si512(e + p * GEMM_PANELS * 64, s.q[p]);
    }
}

/* acc[t][panel][16] += e[k / 4][panel][16][4] * x[k / 4][t][4], with every sum in a register. */
INLINE void gemm_tokens(const int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
    __m512i sum[GEMM_TOKENS][2];
#pragma GCC unroll 14
    for (int t = 0; t < T; t++) sum[t][0] = LINE(acc + 32 * t), sum[t][1] = LINE(acc + 32 * t + 16);
    for (int k = 0; k < k4; k++, e += 128, x += 4 * T) {
        __m512i w0 = LINE(e), w1 = LINE(e + 64);
#pragma GCC unroll 14
        for (int t = 0; t < T; t++) {
            __m512i four = FOUR(x + 4 * t);
            sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], w0, four);
            sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], w1, four);
        }
    }
#pragma GCC unroll 14
    for (int t = 0; t < T; t++) {
        _mm512_storeu_si512(acc + 32 * t, sum[t][0]);
        _mm512_storeu_si512(acc + 32 * t + 16, sum[t][1]);
    }
}

/* ---------------------------------------------------------------- AVX2 ------------------------------------------ */
#elif ISA_AVX2
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
    for (int t = 0; t < T; t++) sum[t][0] = HALF(acc + 16 * t), sum[t][1] = HALF(acc + 16 * t + 8);
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
        _mm256_storeu_si256((__m256i *)(acc + 16 * t), sum[t][0]);
        _mm256_storeu_si256((__m256i *)(acc + 16 * t + 8), sum[t][1]);
    }
}

/* ---------------------------------------------------------------- plain C --------------------------------------- */
#else
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
                acc[ROWS * t + r] += sum;
            }
}
#endif

/* ---------------------------------------------------------------- shared by AVX2 and plain C -------------------- */
#if !ISA_AVX512
/* A group of lines as plain codes e[COLS / 4][GEMM_PANELS][64]. */
INLINE void expand_kind(const int kind, const uint8_t *w, int groups, uint8_t *e) {
    for (int i = 0; i < groups; i++, w += BYTES[kind], e += COLS[kind] / 4 * GEMM_PANELS * 64)
        for (int b = 0; b < 64; b++) {
            uint8_t *to = e + b, v = w[b];
            const int step = GEMM_PANELS * 64;
            if (kind == Q8) {
                to[0] = v;
            } else if (kind == Q6) {
                uint8_t v2 = w[64 + b], high = w[128 + b];
                to[0] = (uint8_t)((v & 15) | (high & 3) << 4);
                to[step] = (uint8_t)((v >> 4) | (high >> 2 & 3) << 4);
                to[2 * step] = (uint8_t)((v2 & 15) | (high >> 4 & 3) << 4);
                to[3 * step] = (uint8_t)((v2 >> 4) | (high >> 6) << 4);
            } else {
                if (kind == TRIT16) {
                    int escaped = v >= 192;
                    to[4 * step] = (uint8_t)((escaped ? trit16_fifth[v & 63] : v) >> 6);
                    v = escaped ? trit16_high[v & 63] : trit16_low[v & 63];
                }
                for (int p = 0; p < 4; p++) to[p * step] = v >> (2 * p) & 3;
            }
        }
}

#endif

/* ---------------------------------------------------------------- all ------------------------------------------- */
/* `groups` groups of lines of one panel as plain codes e[k / 4][GEMM_PANELS][64]; e points at the panel's own slot. */
static void expand(int kind, const uint8_t *w, int groups, uint8_t *e) {
    switch (kind) {
        case TRIT2: expand_kind(TRIT2, w, groups, e); break;
        case TRIT16: expand_kind(TRIT16, w, groups, e); break;
        case Q8: expand_kind(Q8, w, groups, e); break;
        default: expand_kind(Q6, w, groups, e); break;
    }
}

/* acc[T][GEMM_PANELS][16] += expanded codes times a tile of T tokens, 1 <= T <= GEMM_TOKENS. */
static void gemm(int kind, int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
#if ISA_AVX512
    (void)kind;
#define CASE(n) case n: gemm_tokens(n, e, x, k4, acc); break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
                 CASE(13) CASE(14) }
#else
#define CASE(n) case n: if (kind == Q8) gemm_kind(Q8, n, e, x, k4, acc); else gemm_kind(Q6, n, e, x, k4, acc); break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4) }
#endif
#undef CASE
}

#if !ISA_AVX512
/* As above: the panel is expanded a piece at a time into a buffer that stays in the L1 cache. */
static void dot(int kind, int T, const uint8_t *w, int groups, const int8_t *x, int32_t *acc) {
#if ISA_AVX2
    if (kind == TRIT2 && T == 1) { dot1_trit2(w, groups, x, acc); return; }
#endif
    uint8_t e[80 * ROWS * 4];
    const int piece = 320 / COLS[kind]; /* 320 columns: a multiple of every group */
    memset(acc, 0, sizeof(int32_t) * ROWS * (size_t)T);
    for (int i = 0; i < groups; i += piece) {
        int n = groups - i < piece ? groups - i : piece, k4 = n * COLS[kind] / 4;
        expand(kind, w + (size_t)i * BYTES[kind], n, e);
        gemm(kind, T, e, x + (size_t)i * COLS[kind] * T, k4, acc);
    }
}
#endif

/* How many bytes of a packed matrix are no code of its kind. */
static int64_t count_invalid(int kind, const uint8_t *w, int64_t bytes) {
    int64_t bad = 0;
    if (kind == TRIT2) {
        for (int64_t i = 0; i < bytes; i++) bad += (w[i] & w[i] >> 1 & 0x55) != 0; /* a field of 3 */
    } else if (kind == TRIT16) {
        for (int64_t i = 0; i < bytes; i++) bad += w[i] > 242;
    }
    return bad;
}
