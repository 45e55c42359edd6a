/* Matrix products in words of 4 bytes (1 float, 2 bf16 or 4 int8), with sums in fp32 or int32: rows times "panels".
 *
 * The right side is packed, [N / 16][words][16]: 16 columns side by side, a line of the cache for each word of a row.
 * 16 such lines are a tile of AMX; one is what a vector instruction takes. */
#pragma once
#include <omp.h>
#include "tile.h"

/* Seconds of thread 0 so far, for bench.py. */
enum { PRODUCTS, STAGES, ATTENTION, LOSS, WEIGHTS };
double fused_seconds[5];
ALWAYS double since(int what, double start) {
    double now = omp_get_wtime();
    if (!omp_get_thread_num()) fused_seconds[what] += now - start;
    return now;
}

/* ---------------------------------------------------------------------------------------------- packing */
/* 16 rows, `stride` bytes apart, as the columns of a panel. */
ALWAYS void pack_rows(int words, const char *from, int64_t stride, char *panel) {
    for (int k = 0; k < words; k += LANES)
        for (int i = 0; i < 16; i += LANES)
            transpose_block(from + i * stride + 4 * k, stride, panel + 64 * k + 4 * i, 64);
}
/* Two rows of bf16 -> words of two */
ALWAYS void pair(vs a, vs b, char *to) {
    vu both = widen(a) | widen(b) << 16;
    memcpy(to, &both, sizeof both);
}
/* `wide` times 16 columns of values (rows `stride` values apart) as those of panels, to be summed over rows; zeros
 * behind them. Row by row, since rows are in different pages. */
ALWAYS void pack_columns(const int bf16, int wide, int rows, int words, const void *from, int64_t stride, char *panels,
                         int64_t away) {
    int k = 0;
    for (; k < rows >> bf16; k++) {
        for (int i = 0; i < 1 << bf16; i++) /* each row is in another page */
            for (int j = 0; j < wide; j += 1 << bf16)
                __builtin_prefetch(AT(from, ((int64_t)(k + 8) * (1 << bf16) + i) * stride + 16 * j));
        for (int j = 0; j < wide; j++) {
            char *to = panels + 64 * (j * away + k);
            if (!bf16) { memcpy(to, AT(from, k * stride + 16 * j), 64); continue; }
            for (int i = 0; i < 16; i += LANES) {
                vs a, b;
                memcpy(&a, AT(from, 2 * k * stride + 16 * j + i), sizeof a);
                memcpy(&b, AT(from, (2 * k + 1) * stride + 16 * j + i), sizeof b);
                pair(a, b, to + 4 * i);
            }
        }
    }
    for (int j = 0; j < wide; j++) memset(panels + 64 * (j * away + k), 0, 64 * (size_t)(words - k));
}

/* Memory that is given out piece by piece; if there is none (NULL), it is only counted. */
typedef struct { char *memory; size_t size; } arena;
ALWAYS void *arena_alloc(arena *a, size_t bytes) {
    char *piece = a->memory ? a->memory + a->size : NULL;
    a->size += (bytes + 63) / 64 * 64;
    return piece;
}

/* n rows that go into a product, and some more that may be read */
ALWAYS void *alloc_rows(arena *a, int kind, int64_t n, int64_t width) {
    return arena_alloc(a, (size_t)((n + HIGH) * row_stride(kind, width) * 4) >> kind);
}

/* The weights (N, K) of a layer: `panels` for products with rows of K, `back` for those of gradients, with rows of N.
 * Values; or trits, int8 in `panels` and values in `back`, and in `columns` (N) what each is worth. */
typedef struct { char *panels, *back; float *columns; } packed;
ALWAYS packed alloc_packed(arena *a, int bf16, int ternary, int64_t N, int K) {
    packed p = {.panels = arena_alloc(a, 64 * (size_t)((N + 15) / 16 * words_of(ternary ? INT8 : bf16, K)))};
    p.back = arena_alloc(a, 4 * (size_t)K * (size_t)words_of(bf16, N));
    if (ternary) p.columns = arena_alloc(a, 4 * (size_t)N);
    return p;
}

/* Latent weights (rows, K); rows are a multiple of 16 where others of its layer follow, to be side by side. */
typedef struct {
    int layer, rows, K;
    float scale;            /* output: the scale of the trits, mean |w| */
    const float *weights;
} matrix;
typedef struct {
    int bf16, ternary, count;
    matrix *matrices;       /* layer by layer */
    char *to;
    int64_t bytes;          /* output: how many that takes */
} packing;

/* The layer that begins with matrix i: its N, and where it goes. */
ALWAYS packed next_layer(const packing *p, int i, arena *a, int64_t *N) {
    *N = 0;
    for (int j = i; j < p->count && p->matrices[j].layer == p->matrices[i].layer; j++) *N += p->matrices[j].rows;
    return alloc_packed(a, p->bf16, p->ternary, *N, p->matrices[i].K);
}
ALWAYS int begins_layer(const packing *p, int i) { return !i || p->matrices[i].layer != p->matrices[i - 1].layer; }

void fused_pack_bytes(packing *p) {
    arena a = {NULL, 0};
    int64_t N;
    for (int i = 0; i < p->count; i++)
        if (begins_layer(p, i)) next_layer(p, i, &a, &N);
    p->bytes = (int64_t)a.size;
}

/* Up to 16 rows of a matrix from row n on, which are first + n, ... of the N of its layer; row, value: scratch */
ALWAYS void pack_some(const int bf16, const int ternary, const matrix *m, int n, int64_t first, int64_t N, packed to,
                      char *row, char *value) {
    const int K = m->K, high = words_of(ternary ? INT8 : bf16, K), deep = words_of(bf16, N);
    const int wide = m->rows - n < 16 ? m->rows - n : 16, at = (int)((first + n) >> bf16);
    const float inverse = 1.0f / m->scale;
    for (int r = 0; r < 16; r++) {
        for (int k = 0; k < K; k += LANES) {
            vf v = {0};
            if (r < wide) v = load(m->weights + (int64_t)(n + r) * K + k);
            if (ternary) { /* clamped before they are rounded: the same trits */
                v = roundv(maxv(minv(v * inverse, splat(1.0f)), splat(-1.0f)));
                vb t = tobytes(toint(v)) + TRIT_OFFSET;
                memcpy(row + 4 * r * high + k, &t, sizeof t);
            }
            put(TO(value, r * K + k), v, bf16);
            if (!ternary) put(TO(row + 4 * r * high, k), v, bf16);
        }
        size_t size = (size_t)K * (ternary ? 1 : bf16 ? 2 : 4);
        memset(row + 4 * r * high + size, 0, 4 * (size_t)high - size);
    }
    pack_rows(high, row, 4 * high, to.panels + 4 * (first + n) * high);
    int last = first + n + 16 >= N; /* zeros behind it */
    pack_columns(bf16, K / 16, 16, last ? deep - at : 16 >> bf16, value, K, to.back + 64 * (size_t)at, deep);
    for (int r = 0; r < wide && ternary; r++) to.columns[first + n + r] = m->scale;
}

/* The sum of n |w|. (torch adds them in another order: its scale may be another in the last bit.) */
ALWAYS double magnitude(const float *w, int n) {
    vf sum[WAYS] = {{0}};
    for (int i = 0; i < n; i += 16)
        EACH_WAY(u) sum[u] += absv(load(w + i + LANES * u));
    return (double)sum_of(sum);
}

void fused_pack(const packing *p) {
    int widest = 0, all = 0;
    for (int i = 0; i < p->count; i++) {
        const matrix *m = p->matrices + i;
        all += m->rows, widest = m->K > widest ? m->K : widest;
    }
    double start = omp_get_wtime(), *magnitudes = buffer_of(sizeof(double) * (size_t)all);
#pragma omp parallel
    {
        char *row = buffer_of(64 * (size_t)words_of(FLOAT, widest)), *value = buffer_of(64 * (size_t)widest);
        for (int i = 0, before = 0; p->ternary && i < p->count; before += p->matrices[i++].rows) {
            const matrix *m = p->matrices + i;
#pragma omp for schedule(static) nowait
            for (int n = 0; n < m->rows; n++) magnitudes[before + n] = magnitude(m->weights + (int64_t)n * m->K, m->K);
        }
#pragma omp barrier
#pragma omp single
        for (int i = 0, r = 0; p->ternary && i < p->count; i++) {
            matrix *m = p->matrices + i;
            double sum = 0;
            for (int n = 0; n < m->rows; n++) sum += magnitudes[r++];
            m->scale = (float)(sum / m->rows / m->K);
            if (m->scale < 1e-5f) m->scale = 1e-5f;
        }
        arena a = {p->to, 0};
        packed to = {0};
        int64_t N = 0, first = 0;
        for (int i = 0; i < p->count; i++) {
            const matrix *m = p->matrices + i;
            if (begins_layer(p, i)) to = next_layer(p, i, &a, &N), first = 0;
#pragma omp for schedule(static) nowait
            for (int n = 0; n < m->rows; n += 16) {
                if (p->ternary && p->bf16) pack_some(1, 1, m, n, first, N, to, row, value);
                else if (p->ternary) pack_some(0, 1, m, n, first, N, to, row, value);
                else if (p->bf16) pack_some(1, 0, m, n, first, N, to, row, value);
                else pack_some(0, 0, m, n, first, N, to, row, value);
            }
            first += m->rows;
        }
        free(row), free(value);
    }
    free(magnitudes);
    since(WEIGHTS, start);
}

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
