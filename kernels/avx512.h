/* AVX-512 with VNNI: a line of 64 bytes is one register. With VBMI a table of 64 bytes is one lookup.
 * Included by integers.h, which says what dot, expand and gemm are. */
#pragma once
#include <immintrin.h>
#include "integers.h"

#define ISA "avx512"
#define GEMM_PANELS 2
#define GEMM_TOKENS 14 /* 2 * 14 accumulators, 2 weights, 1 activation: 31 of 32 registers */
#define FEW 8
#define INLINE static inline __attribute__((always_inline))
#define SET(c) _mm512_set1_epi8((char)(c))
#define LINE(p) _mm512_loadu_si512((const void *)(p))
#define FOUR(x) _mm512_set1_epi32(load4(x))

typedef struct { __m512i q[5]; } planes;

/* sum + codes * x: as an instruction and not the compiler's `_mm512_dpbusd_epi32`, around which gcc copies every sum to
 * another register and back, a quarter of all instructions of the loops below. */
INLINE __m512i dpbusd(__m512i sum, __m512i codes, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    return sum;
}

/* ... with the same four x, from memory, for all lanes */
INLINE __m512i dpbusd4(__m512i sum, __m512i codes, const int8_t *x) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*(const int8_t (*)[4])x));
    return sum;
}

#if defined(__AVX512VBMI__)
#define permute(table, index) _mm512_permutexvar_epi8(index, table)
#define permute_where(other, mask, table, index) _mm512_mask_permutexvar_epi8(other, mask, index, table)
#else
INLINE __m512i permute(__m512i table, __m512i index) { /* four 16-byte shuffles, chosen by bits 4-5 */
    __m512i low = _mm512_and_si512(index, SET(15)), made = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        __mmask64 here = _mm512_cmpeq_epi8_mask(_mm512_and_si512(index, SET(48)), SET(16 * i));
        __m512i quarter = _mm512_set_epi64(2*i+1, 2*i, 2*i+1, 2*i, 2*i+1, 2*i, 2*i+1, 2*i);
        __m512i part = _mm512_permutexvar_epi64(quarter, table);
        made = _mm512_mask_shuffle_epi8(made, here, part, low);
    }
    return made;
}
#define permute_where(other, mask, table, index) _mm512_mask_blend_epi8(mask, other, permute(table, index))
#endif

/* A line of trits as bytes of four fields of two bits, and the fifth trits in bits 6-7. */
typedef struct { __m512i four, fifth; } fields;
INLINE fields read_fields(const int kind, const uint8_t *w) {
    __m512i v = LINE(w), fifth;
    __asm__("" : "+v"(v)); /* stays in a register: gcc would read it again for every plane, more than AMD's CPUs can */
    if (kind == TRIT2) return (fields){v, v};
    __mmask64 escaped = _mm512_cmpge_epu8_mask(v, SET(192));
    fifth = permute_where(_mm512_and_si512(v, SET(192)), escaped, LINE(trit16_fifth), v);
    return (fields){permute_where(permute(LINE(trit16_low), v), escaped, LINE(trit16_high), v), fifth};
}

/* Plane p of codes that still stand at their bits: 4^p times what they are, the fifth 64 times. */
INLINE __m512i standing(fields f, int p) { return p < 4 ? _mm512_and_si512(f.four, SET(3 << 2 * p)) : f.fifth; }

/* A group of lines as planes of plain codes, ready to be multiplied: COLS / 4 planes. */
INLINE planes codes(const int kind, const uint8_t *w) {
    planes s;
    if (kind == TRIT2 || kind == TRIT16) {
        fields f = read_fields(kind, w);
#pragma GCC unroll 5
        for (int p = 0; p < 5; p++) s.q[p] = _mm512_srli_epi16(standing(f, p), p < 4 ? (unsigned)(2 * p) : 6);
    } else if (kind == Q8) {
        s.q[0] = LINE(w);
    } else { /* Q6: low four bits from lines 0-1, high two from line 2 */
        __m512i a = LINE(w), b = LINE(w + 64), c = LINE(w + 128), low = SET(15), six = SET(63);
        /* 0xCA: where `low` has a bit take the first, else the second */
        s.q[0] = _mm512_and_si512(six, _mm512_ternarylogic_epi32(low, a, _mm512_slli_epi16(c, 4), 0xCA));
        s.q[1] = _mm512_and_si512(six, _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(a, 4),
                                                                 _mm512_slli_epi16(c, 2), 0xCA));
        s.q[2] = _mm512_and_si512(six, _mm512_ternarylogic_epi32(low, b, c, 0xCA));
        s.q[3] = _mm512_and_si512(six, _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(b, 4),
                                                                 _mm512_srli_epi16(c, 2), 0xCA));
    }
    return s;
}

/* Two panels of trits times one token: two line operations (and, dot) a plane, 64 weights a cycle at 2 bits. A dot
 * product takes 5 cycles and two start in each, so 8 or 10 sums must be on their way. */
INLINE void dot_token(const int kind, const uint8_t *const *w, int lines, enum prefetch how, const int8_t *x,
                      int32_t *acc) {
    const int P = kind == TRIT16 ? 5 : 4;
    const uint8_t *w0 = w[0], *w1 = w[1];
    __m512i total[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int done = 0; done < lines;) {
        int n = lines - done < COLS_PER_SUM / 20 ? lines - done : COLS_PER_SUM / 20;
        __m512i sum[2][5];
        for (int p = 0; p < P; p++) sum[0][p] = sum[1][p] = _mm512_setzero_si512();
        fields a = read_fields(kind, w0), b = read_fields(kind, w1);
        for (int i = 0; i < n; i++, x += 4 * P) {
            prefetch(w0, how);
            prefetch(w1, how);
            if (i + 1 < n) w0 += 64, w1 += 64;
            fields a_next = read_fields(kind, w0), b_next = read_fields(kind, w1); /* while these are multiplied */
#pragma GCC unroll 5
            for (int p = 0; p < P; p++) {
                sum[0][p] = dpbusd4(sum[0][p], standing(a, p), x + 4 * p);
                sum[1][p] = dpbusd4(sum[1][p], standing(b, p), x + 4 * p);
            }
            a = a_next, b = b_next;
        }
        w0 += 64, w1 += 64;
        for (int h = 0; h < 2; h++)
#pragma GCC unroll 5
            for (int p = 0; p < P; p++)
                total[h] = _mm512_add_epi32(total[h], _mm512_srai_epi32(sum[h][p], p < 4 ? (unsigned)(2 * p) : 6));
        done += n;
    }
    _mm512_storeu_si512(acc, total[0]);
    _mm512_storeu_si512(acc + ROWS, total[1]);
}

/* Two panels times T tokens. */
INLINE void dot_tokens(const int kind, const int T, const uint8_t *const *w, int groups, enum prefetch how,
                       const int8_t *x, int32_t *acc) {
    const int P = COLS[kind] / 4, S = T > 4 ? 1 : T > 2 ? 2 : T > 1 ? 3 : 4;
    const uint8_t *w0 = w[0], *w1 = w[1];
    __m512i sum[2][4][8];
    for (int h = 0; h < 2; h++)
        for (int u = 0; u < S; u++) for (int t = 0; t < T; t++) sum[h][u][t] = _mm512_setzero_si512();
    for (int i = 0; i < groups; i++, w0 += BYTES[kind], w1 += BYTES[kind], x += 4 * P * T) {
        planes a = codes(kind, w0), b = codes(kind, w1);
        for (int line = 0; line < BYTES[kind]; line += 64) {
            prefetch(w0 + line, how);
            prefetch(w1 + line, how);
        }
#pragma GCC unroll 5
        for (int p = 0; p < P; p++)
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                __m512i four = FOUR(x + 4 * (p * T + t));
                sum[0][p % S][t] = dpbusd(sum[0][p % S][t], a.q[p], four);
                sum[1][p % S][t] = dpbusd(sum[1][p % S][t], b.q[p], four);
            }
    }
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            for (int u = 1; u < S; u++) sum[h][0][t] = _mm512_add_epi32(sum[h][0][t], sum[h][u][t]);
            _mm512_storeu_si512(acc + ROWS * (2 * t + h), sum[h][0][t]);
        }
}

INLINE void dot_kind(const int kind, int T, const uint8_t *const *w, int groups, enum prefetch how, const int8_t *x,
                     int32_t *acc) {
#define CASE(n) case n: dot_tokens(kind, n, w, groups, how, x, acc); break;
    switch (T) { CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        default: if (kind == TRIT2 || kind == TRIT16) dot_token(kind, w, groups, how, x, acc);
                 else dot_tokens(kind, 1, w, groups, how, x, acc); }
#undef CASE
}

static void dot(int kind, int T, const uint8_t *const *w, int groups, enum prefetch how, const int8_t *x,
                int32_t *acc) {
    if (kind == TRIT2) dot_kind(TRIT2, T, w, groups, how, x, acc);
    else if (kind == TRIT16) dot_kind(TRIT16, T, w, groups, how, x, acc);
    else if (kind == Q8) dot_kind(Q8, T, w, groups, how, x, acc);
    else dot_kind(Q6, T, w, groups, how, x, acc);
}

INLINE void expand_kind(const int kind, const uint8_t *w, int groups, uint8_t *e) {
    const int P = COLS[kind] / 4;
    for (int i = 0; i < groups; i++, w += BYTES[kind], e += P * GEMM_PANELS * 64) {
        planes s = codes(kind, w);
        for (int i = 0; i < BYTES[kind]; i += 64) prefetch(w + i, NEAR);
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
            sum[t][0] = dpbusd(sum[t][0], w0, four);
            sum[t][1] = dpbusd(sum[t][1], w1, four);
        }
    }
#pragma GCC unroll 14
    for (int t = 0; t < T; t++) {
        _mm512_storeu_si512(acc + 32 * t, sum[t][0]);
        _mm512_storeu_si512(acc + 32 * t + 16, sum[t][1]);
    }
}

static void gemm(int kind, int T, const uint8_t *e, const int8_t *x, int k4, int32_t *acc) {
    (void)kind;
#define CASE(n) case n: gemm_tokens(n, e, x, k4, acc); break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
                 CASE(13) CASE(14) }
#undef CASE
}

#if ISA_AMX
/* acc[t][2][16] (+= where there is `more` to the sums, else =) two expanded panels e[k / 4][2][64] times one or `two`
 * tiles x[k / 64][16][64], `apart` bytes from each other; k is a multiple of 64. */
static void gemm_tiles(bool two, const uint8_t *e, const int8_t *x, size_t apart, int k, bool more, int32_t *acc) {
    const int8_t *second = x + apart;
    enum { AWAY = 4 * 2 * ROWS }; /* bytes from one token's sums to the next one's */
    int32_t *below = acc + 16 * 2 * ROWS;
    __asm__("" ::: "memory"); /* gcc does not know that tiles read memory, */
    if (more) {
        _tile_loadd(0, acc, AWAY);
        _tile_loadd(1, acc + ROWS, AWAY);
        if (two) { _tile_loadd(2, below, AWAY); _tile_loadd(3, below + ROWS, AWAY); }
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (; k; k -= 64, e += 16 * 128, x += 1024, second += 1024) {
        _tile_loadd(6, e, 128);
        _tile_loadd(7, e + 64, 128);
        _tile_loadd(4, x, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (!two) continue;
        _tile_loadd(5, second, 64);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, acc, AWAY);
    _tile_stored(1, acc + ROWS, AWAY);
    if (two) { _tile_stored(2, below, AWAY); _tile_stored(3, below + ROWS, AWAY); }
    __asm__("" ::: "memory"); /* and write it */
}
#endif
