/* Matrix products in words of 4 bytes (1 float, 2 bf16 or 4 int8), with sums in fp32 or int32: rows times "panels".
 *
 * The right side is packed, [N / 16][words][16]: 16 columns side by side, a line of the cache for each word of a row.
 * 16 such lines are a tile of AMX; one is what a vector instruction takes. Neighbours: weights.h packs it. */
#pragma once
#include "weights.h"

/* ---------------------------------------------------------------------------------------------- rows times weights */
typedef struct { /* y (M, N) of rows of K, and what becomes of it on its way to memory */
    int N, K;
    const void *panels;
    const float *rows, *columns; /* NULL, or factors */
    const int32_t *sums;         /* of each row of int8, where TRIT_OFFSET */
    const void *residual;        /* NULL, or y is fp32, and what is not dropped is added to this; */
    drop drop;
    float share, by;             /* with `by` y is values: `share` of the residual and `by` of the product */
    int first;                   /* the panel that y begins with, a multiple of 2: on its left it stays as it is */
    void *y;
    int64_t away;                /* rows of y from each other, in values */
} product;

ALWAYS void finish(const int kind, const int bf16, const product *p, int64_t m, int n, vi acc) {
    vf v = (vf)acc;
    if (kind == INT8) v = tofloat(TRIT_OFFSET ? acc - p->sums[m] : acc);
    if (p->rows) v *= p->rows[m];
    if (p->columns) v *= load(p->columns + n);
    if (!p->residual) { put(TO(p->y, m * p->away + n), v, bf16); return; }
    if (p->by) {
        put(TO(p->y, m * p->away + n), p->share * get(AT(p->residual, m * p->away + n), bf16) + p->by * v, bf16);
        return;
    }
    if (p->drop.below) v = dropped(p->drop, (vu)(lanes() + (int32_t)(m * p->N + n)), v);
    store((float *)p->y + m * p->N + n, load((const float *)p->residual + m * p->N + n) + v);
}

ALWAYS void finish_panel(const int kind, const int bf16, const product *p, int64_t m, int n, const char *sums) {
    for (int i = 0; i < 16; i += LANES) finish(kind, bf16, p, m, n + i, loadi(sums + 4 * i));
}

/* Has a row's place in the cache by the time that `finish` wants it: the next row is in another page. */
ALWAYS void expect(const int bf16, const product *p, int64_t m, int n) {
    if (!p->residual || p->by) { __builtin_prefetch(TO(p->y, m * p->away + n), 1); return; }
    for (int i = 0; i < 32; i += 16) {
        __builtin_prefetch((float *)p->y + m * p->N + n + i, 1);
        __builtin_prefetch((const float *)p->residual + m * p->N + n + i);
    }
}

#define BLOCK 64       /* rows that a thread takes: a column of them, in int8, is a line of the cache */
#define TOGETHER 192   /* rows that it takes through a layer at a time: hardly more than a multiple of HIGH */

/* Rows m0 ... m0 + rows - 1, which start at x and have HIGH - 1 rows more to be read; the rows of y have
 * room for N in whole vectors. */
ALWAYS void multiply_kind(const int kind, const int bf16, const product *p, int64_t m0, int rows, const char *x) {
    int words = words_of(kind, p->K), wide = (p->N + 15) / 16;
    int64_t stride = 4 * (words | 16);
    /* A few rows and all panels, where those stay in L2; else all rows and two panels, part of their sums at a time. */
    const int deep = DEEP(kind);
    int group = words <= deep && 64 * words * (int64_t)wide <= PANELS_IN_L2 ? GROUP : rows;
    _Alignas(64) char acc[TOGETHER / HIGH + 1][HIGH][128];
    for (int low = 0; low < rows; low += group) {
        int end = low + group < rows ? low + group : rows;
        for (int n = p->first; n < wide; n += 2) {
            const char *w0 = (const char *)p->panels + 64 * (int64_t)n * words;
            const char *w1 = n + 1 < wide ? w0 + 64 * words : w0;
            for (int m = low; m < end; m++) expect(bf16, p, m0 + m, 16 * n);
            for (int k = 0; k < words; k += deep)
                for (int i = 0; low + i * HIGH < end; i++)
                    multiply(kind, end - low - i * HIGH, words - k < deep ? words - k : deep,
                             x + (low + i * HIGH) * stride + 4 * k, stride, w0 + 64 * k, w1 + 64 * k, k > 0,
                             acc[i][0], 128);
            for (int m = low; m < end; m++) {
                const char *sums = acc[(m - low) / HIGH][(m - low) % HIGH];
                finish_panel(kind, bf16, p, m0 + m, 16 * n, sums);
                if (n + 1 < wide) finish_panel(kind, bf16, p, m0 + m, 16 * n + 16, sums + 64);
            }
        }
    }
}

static __attribute__((noinline)) void multiply_rows(int kind, int bf16, const product *p, int64_t m0, int rows,
                                                    const char *x) {
    if (kind == INT8 && bf16) multiply_kind(INT8, 1, p, m0, rows, x);
    else if (kind == INT8) multiply_kind(INT8, 0, p, m0, rows, x);
    else if (bf16) multiply_kind(BF16, 1, p, m0, rows, x);
    else multiply_kind(FLOAT, 0, p, m0, rows, x);
}

/* The rows of a thread, `m` to m + rows - 1 at a time. */
#define EACH_ROWS(M) \
    for (int64_t blocks = ((M) + BLOCK - 1) / BLOCK, thread = omp_get_thread_num(), threads = omp_get_num_threads(), \
         m = blocks * thread / threads * BLOCK, last = blocks * (thread + 1) / threads * BLOCK, \
         end = last < (M) ? last : (M), rows; \
         m < end && (rows = end - m < TOGETHER ? end - m : TOGETHER); m += rows)

/* ---------------------------------------------------------------------------------------------- weight gradients */
/* n int8 (a multiple of 16; of 32 for bf16) -> values */
ALWAYS void to_values(const int bf16, int n, const int8_t *from, char *to) {
    for (int i = 0; i < n; i += LANES << bf16) {
        vb a, b;
        memcpy(&a, from + i, sizeof a);
        vf v = tofloat(widen_bytes(a));
        if (!bf16) { put(TO(to, i), v, 0); continue; }
        memcpy(&b, from + i + LANES, sizeof b);
        put_two(to + 2 * i, v, tofloat(widen_bytes(b)));
    }
}

#define PANELS 8     /* of the gradients, packed at once: they stay in L2 while all of `kept` passes */
#define TOKENS 4096  /* summed at once */

/* Sums (high, LANES), rows of 32 -> as columns of `to` (at most LANES and n; K apart), divided by
 * those of `columns`, or added. */
ALWAYS void add_transposed(const int high, int n, int K, const char *from, const float *columns, int added, float *to) {
    vi tile[LANES] = {0};
    for (int i = 0; i < high; i++) tile[i] = loadi(from + 128 * i);
    transpose_words(tile);
    for (int i = 0; i < LANES && i < n; i++) {
        vf v = (vf)tile[i], old = {0};
        if (columns) v *= 1.0f / columns[i];
        if (added) memcpy(&old, to + (int64_t)i * K, 4 * (size_t)high);
        v += old;
        memcpy(to + (int64_t)i * K, &v, 4 * (size_t)high);
    }
}

/* grad_w (N, K) fp32 = (grad / columns)^T x, or that is `added` to it. kept: x transposed, (K, M), values or
 * int8, its rows `away` elements from each other, with HIGH - 1 rows more to be read; grad: values (M, N),
 * its rows `stride` values. */
ALWAYS void weight_grad(const int kind, const int bf16, int64_t M, int N, int K, const void *kept, int64_t away,
                        const void *grad, int64_t stride, const float *columns, int added, float *grad_w) {
    int most = words_of(bf16, M < TOKENS ? M : TOKENS), share = (N + 15) / 16 / (2 * omp_get_max_threads()) / 2 * 2;
    share = share < 2 ? 2 : share < PANELS ? share : PANELS; /* work for every thread comes first */
#pragma omp parallel
    {
        _Alignas(64) char acc[PANELS / 2][HIGH][128];
        char *panels = buffer_of(64 * (size_t)most * (size_t)share);
        _Alignas(64) char floats[kind == INT8 ? HIGH : 1][4 * (WORDS | 16)];
        tiles before = begin_tiles();
#pragma omp for schedule(dynamic)
        for (int n0 = 0; n0 < N; n0 += 16 * share)
            for (int64_t m0 = 0; m0 < M; m0 += TOKENS) {
                int tokens = M - m0 < TOKENS ? (int)(M - m0) : TOKENS, words = words_of(bf16, tokens);
                int wide = (N - n0 + 15) / 16;
                wide = wide < share ? wide : share;
                pack_columns(bf16, wide, tokens, words, AT(grad, m0 * stride + n0), stride, panels, words);
                for (int k = 0; k < K; k += HIGH) {
                    for (int low = 0; low < words; low += WORDS) {
                        int deep = words - low < WORDS ? words - low : WORDS;
                        int64_t at = k * away + m0 + (low << bf16), width = away * (bf16 ? 2 : 4);
                        const char *rows = AT(kept, at);
                        if (kind == INT8) {
                            rows = floats[0], width = sizeof floats[0];
                            for (int i = 0; i < HIGH && k + i < K; i++)
                                to_values(bf16, deep << bf16, (const int8_t *)kept + at + i * away, floats[i]);
                        }
                        for (int j = 0; j < wide; j += 2) {
                            const char *w0 = panels + 64 * ((size_t)j * words + low);
                            const char *w1 = j + 1 < wide ? w0 + 64 * (size_t)words : w0;
                            multiply(bf16, K - k, deep, rows, width, w0, w1, low > 0, acc[j / 2][0], 128);
                        }
                    }
                    for (int j = 0; j < 16 * wide; j += LANES)
                        for (int top = 0; top < HIGH && k + top < K; top += LANES) {
                            int most = HIGH - top < K - k - top ? HIGH - top : K - k - top, n = n0 + j;
                            float *to = grad_w + (int64_t)n * K + k + top;
                            const float *by = columns ? columns + n : NULL;
                            const char *from = acc[j / 32][top] + 4 * (j % 32);
                            /* sizes known */
                            if (most >= LANES) add_transposed(LANES, N - n, K, from, by, added || m0, to);
                            else add_transposed(most, N - n, K, from, by, added || m0, to);
                        }
                }
            }
        free(panels);
        end_tiles(before);
    }
}

static void gradients(int kind, int bf16, int64_t M, int N, int K, const void *kept, int64_t away, const void *grad,
                      int64_t stride, const float *columns, int added, float *grad_w) {
    double start = omp_get_wtime();
    if (kind == INT8 && bf16) weight_grad(INT8, 1, M, N, K, kept, away, grad, stride, columns, added, grad_w);
    else if (kind == INT8) weight_grad(INT8, 0, M, N, K, kept, away, grad, stride, columns, added, grad_w);
    else if (bf16) weight_grad(BF16, 1, M, N, K, kept, away, grad, stride, columns, added, grad_w);
    else weight_grad(FLOAT, 0, M, N, K, kept, away, grad, stride, columns, added, grad_w);
    since(PRODUCTS, start);
}
