/* Weights packed for products (matmul.h draws the layout), as values or as trits, and memory given out piece by piece. */
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
